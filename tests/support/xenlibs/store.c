/*
 * Kept from xenstored: what it has fired may be on its way to us yet, until it has answered something that we asked;
 * and what is written in a transaction is seen when that ends, all at once or not at all.
 */
#include "xen.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define NODES 256
#define STORES 8
#define WATCHES 16
#define EVENTS 128

struct node { char path[128], value[64]; };
struct watch { char path[128], token[32]; };

struct xen_store {
    bool open;
    int note; /* eventfd: look at your watches */
    struct watch watches[WATCHES], events[EVENTS];
    unsigned nr_watches, head, tail, come; /* events up to `come` are here */
    struct node staged; /* in the transaction; adapters write one node in it */
    bool writes;
};

static struct node nodes[NODES];
static struct xen_store stores[STORES];
static pthread_t caller; /* of the test */

/* ------------------------------------------------------------ nodes and watches */

static bool is_below(const char *path, const char *top)
{
    size_t n = strlen(top);

    return strncmp(path, top, n) == 0 && (path[n] == '\0' || path[n] == '/');
}

/* What is on its way comes. */
static void tell(struct xen_store *store)
{
    if (store->come == store->head)
        return;
    store->come = store->head;
    eventfd_write(store->note, 1);
}

static void fire(struct xen_store *store, unsigned watch, const char *path)
{
    struct watch *event = &store->events[store->head++ % EVENTS];

    snprintf(event->path, sizeof event->path, "%s", path);
    memcpy(event->token, store->watches[watch].token, sizeof event->token);
    if (guest.prompt == 0)
        return;
    guest.prompt--;
    tell(store);
}

static void fire_all(const char *path)
{
    for (unsigned s = 0; s < STORES; s++)
        for (unsigned w = 0; stores[s].open && w < stores[s].nr_watches; w++)
            if (is_below(path, stores[s].watches[w].path))
                fire(&stores[s], w, path);
}

static struct node *find_node(const char *path)
{
    for (unsigned i = 0; i < NODES; i++)
        if (strcmp(nodes[i].path, path) == 0)
            return &nodes[i];
    return NULL;
}

void fake_store_reset(void)
{
    memset(nodes, 0, sizeof nodes);
    caller = pthread_self();
}

static void set_node(const char *path, const char *value)
{
    struct node *node = find_node(path);

    if (!node)
        node = find_node(""); /* a free one */
    if (!node)
        abort();
    snprintf(node->path, sizeof node->path, "%s", path);
    snprintf(node->value, sizeof node->value, "%s", value);
}

void fake_put(const char *path, const char *value)
{
    LOCKED;
    if (path[0] != '@') /* @releaseDomain is but told */
        set_node(path, value);
    fire_all(path);
}

void fake_drop(const char *path)
{
    LOCKED;
    for (unsigned i = 0; i < NODES; i++)
        if (nodes[i].path[0] && is_below(nodes[i].path, path))
            nodes[i].path[0] = '\0';
    fire_all(path);
}

const char *fake_get(const char *path)
{
    LOCKED;
    struct node *node = find_node(path);

    return node ? node->value : "";
}

/* ------------------------------------------------------------ libxenstore */

struct xen_store *xs_open(unsigned long flags)
{
    LOCKED;
    for (unsigned s = 0; s < STORES; s++)
        if (!stores[s].open) {
            stores[s] = (struct xen_store){ .open = true, .note = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC) };
            return &stores[s];
        }
    abort();
}

void xs_close(struct xen_store *store)
{
    if (!store)
        return;
    LOCKED;
    store->open = false;
    close(store->note);
}

void *xs_read(struct xen_store *store, uint32_t t, const char *path, unsigned *length)
{
    LOCKED;
    struct node *node = find_node(path);

    tell(store);
    guest.waited += t == 0 && pthread_equal(pthread_self(), caller);
    if (!node) {
        errno = ENOENT;
        return NULL;
    }
    *length = (unsigned)strlen(node->value);
    return strdup(node->value);
}

/* The guest sees what an adapter writes. */
static void commit(const struct node *written)
{
    fake_put(written->path, written->value);
    if (strcmp(written->path, SHUTDOWN_NODE) == 0)
        fake_react();
}

bool xs_write(struct xen_store *store, uint32_t t, const char *path, const void *data, unsigned length)
{
    LOCKED;
    struct node written;

    snprintf(written.path, sizeof written.path, "%s", path);
    snprintf(written.value, sizeof written.value, "%.*s", (int)length, (const char *)data);
    if (t == 0) {
        commit(&written);
        return true;
    }
    if (store->writes)
        abort();
    store->staged = written;
    store->writes = true;
    return true;
}

char **xs_directory(struct xen_store *store, uint32_t t, const char *path, unsigned *number)
{
    size_t n = strlen(path), room = NODES * (sizeof(char *) + sizeof nodes[0].path);
    char **names = calloc(1, room), *text = (char *)(names + NODES);

    *number = 0;
    LOCKED;
    for (int i = 0; i < NODES; i++) {
        const char *rest = nodes[i].path + n + 1;
        bool known = false;

        if (strncmp(nodes[i].path, path, n) != 0 || nodes[i].path[n] != '/')
            continue;
        snprintf(text, sizeof nodes[0].path, "%.*s", (int)strcspn(rest, "/"), rest);
        for (unsigned k = 0; k < *number; k++)
            known |= strcmp(names[k], text) == 0;
        if (known)
            continue;
        names[(*number)++] = text;
        text += strlen(text) + 1;
    }
    return names;
}

uint32_t xs_transaction_start(struct xen_store *store)
{
    store->writes = false;
    return 1;
}

bool xs_transaction_end(struct xen_store *store, uint32_t t, bool give_up)
{
    LOCKED;
    if (give_up)
        return true;
    if (guest.broken_in) {
        guest.broken_in = false;
        errno = EAGAIN;
        return false;
    }
    if (store->writes)
        commit(&store->staged);
    return true;
}

bool xs_watch(struct xen_store *store, const char *path, const char *token)
{
    LOCKED;
    unsigned w = store->nr_watches++;

    if (w == WATCHES)
        abort();
    snprintf(store->watches[w].path, sizeof store->watches[w].path, "%s", path);
    snprintf(store->watches[w].token, sizeof store->watches[w].token, "%s", token);
    fire(store, w, path);
    return true;
}

bool xs_unwatch(struct xen_store *store, const char *path, const char *token)
{
    LOCKED;
    for (unsigned w = 0; w < store->nr_watches; w++)
        if (strcmp(store->watches[w].path, path) == 0)
            store->watches[w].path[0] = '-';
    return true;
}

int xs_fileno(struct xen_store *store)
{
    return store->note;
}

/* One block, as libxenstore gives it: the two pointers, and what they point to. */
char **xs_check_watch(struct xen_store *store)
{
    struct { char *pair[2]; struct watch event; } *fired;
    eventfd_t count;

    LOCKED;
    if (store->tail == store->come) {
        eventfd_read(store->note, &count);
        errno = EAGAIN;
        return NULL;
    }
    fired = malloc(sizeof *fired);
    fired->event = store->events[store->tail++ % EVENTS];
    fired->pair[0] = fired->event.path;
    fired->pair[1] = fired->event.token;
    return fired->pair;
}

bool xs_resume_domain(struct xen_store *store, unsigned domid)
{
    guest.told++;
    return true;
}
