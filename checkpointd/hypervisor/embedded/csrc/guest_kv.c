/*
 * The program `kv`: a key-value store over UDP, answered exactly once.
 *
 * Each client names itself by an id and counts its requests. The store remembers, in RAM, the last request
 * of each client with its answer: a retry is answered from there and not executed twice, whether or not the
 * answer was lost, and on whichever host the guest runs by then. Answers:
 *
 *     ID SEQ STEP ok [VERSION VALUE]      ID SEQ STEP err TEXT
 *
 * STEP is the number of the step that executed the request: over new requests it only grows.
 *
 * RAM: page 0 the header, then pages of clients, then pages of values, each a hash table of pages (a bucket)
 * that spills into the pages after it. Records never cross a page, so they need no contiguous memory.
 */
#include "../../../csrc/strict.h"
#include "guest.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct client {
    char id[TOKEN_MAX];     /* empty: free */
    uint64_t seq;
    uint64_t used;          /* step of the last request */
    uint32_t reply_bytes;
    uint8_t reply[REPLY_MAX - 20];
};

struct value {
    char key[TOKEN_MAX];    /* empty: free */
    uint64_t version;       /* writes so far */
    uint32_t bytes;
    char data[VALUE_MAX];
    uint8_t reserved[20];
};

_Static_assert(sizeof(struct client) == 512, "eight clients fill a page");
_Static_assert(sizeof(struct value) == 256, "sixteen values fill a page");

#define CLIENTS_PER_PAGE (CK_PAGE_SIZE / sizeof(struct client))
#define VALUES_PER_PAGE (CK_PAGE_SIZE / sizeof(struct value))
#define CLIENT_PAGES_MAX 128u   /* 1024 clients; more and the one silent the longest is forgotten */
#define SPILL_PAGES 8u          /* how far a full bucket spills before the store counts as full */

/* An eighth of the memory for clients and half of it for values; the rest is for the balloon. */
int kv_boot(struct machine *m, struct guest_header *header)
{
    if (m->nr_pfns < 16)
        return -ENOMEM;
    header->client_pages = m->nr_pfns / 8 < CLIENT_PAGES_MAX ? m->nr_pfns / 8 : CLIENT_PAGES_MAX;
    header->reserved_pages = 1 + header->client_pages + m->nr_pfns / 2;
    return 0;
}

/* FNV-1a: no secret, since the guest knows no randomness. */
static uint64_t hash(const char *text)
{
    uint64_t h = 0xcbf29ce484222325ull;

    for (; *text; text++)
        h = (h ^ (uint8_t)*text) * 0x100000001b3ull;
    return h;
}

struct place {
    uint64_t pfn;
    uint32_t offset;
};

/* Where this client's record is or goes: its own, else a free one, else that of the client silent longest. */
static struct place place_client(const struct machine *m, const char *id)
{
    uint64_t pfn = 1 + hash(id) % guest_header(m)->client_pages;
    const struct client *clients = machine_page(m, pfn);
    uint32_t oldest = 0;

    for (uint32_t i = 0; i < CLIENTS_PER_PAGE; i++) {
        if (strcmp(clients[i].id, id) == 0)
            return (struct place){ pfn, i * (uint32_t)sizeof *clients };
        if (clients[i].used < clients[oldest].used)     /* a free one was last used at step 0 */
            oldest = i;
    }
    return (struct place){ pfn, oldest * (uint32_t)sizeof *clients };
}

/* Where this key's record is or goes; false: no room. */
static bool place_value(const struct machine *m, const char *key, struct place *place)
{
    const struct guest_header *header = guest_header(m);
    uint64_t first = 1 + header->client_pages;
    uint64_t pages = header->reserved_pages - first;
    uint64_t spill = pages < SPILL_PAGES ? pages : SPILL_PAGES;
    uint64_t bucket = hash(key) % pages;

    for (uint64_t n = 0; n < spill; n++) {
        uint64_t pfn = first + (bucket + n) % pages;
        const struct value *values = machine_page(m, pfn);

        for (uint32_t i = 0; i < VALUES_PER_PAGE; i++) {
            /* Keys are never removed, so the first free record ends the search. */
            if (values[i].key[0] == '\0' || strcmp(values[i].key, key) == 0) {
                *place = (struct place){ pfn, i * (uint32_t)sizeof *values };
                return true;
            }
        }
    }
    return false;
}

static void read_value(const struct machine *m, struct place place, struct value *value)
{
    memcpy(value, (const uint8_t *)machine_page(m, place.pfn) + place.offset, sizeof *value);
}

static void reply_value(const struct request *request, uint64_t step, const struct value *value,
                        struct step_result *result)
{
    result->reply_bytes = (uint32_t)snprintf((char *)result->reply, REPLY_MAX, "%s %llu %llu ok %llu %.*s",
                                             request->id, (unsigned long long)request->seq,
                                             (unsigned long long)step, (unsigned long long)value->version,
                                             (int)value->bytes, value->data);
}

static void execute(struct machine *m, uint64_t step, const struct request *request,
                    struct step_result *result)
{
    struct place place;
    struct value value;

    if (common_verb(request, step, result))
        return;
    bool set = strcmp(request->verb, "set") == 0;
    bool incr = strcmp(request->verb, "incr") == 0;
    if (!set && !incr && strcmp(request->verb, "get") != 0) {
        reply_error(request, step, "unknown verb", result);
        return;
    }
    if (request->key[0] == '\0') {
        reply_error(request, step, "no key", result);
        return;
    }
    if (!place_value(m, request->key, &place)) {
        reply_error(request, step, "full", result);
        return;
    }
    read_value(m, place, &value);
    if (set) {
        value.bytes = request->value_bytes;
        memset(value.data, 0, sizeof value.data);
        memcpy(value.data, request->value, request->value_bytes);
    } else if (incr) {
        char text[VALUE_MAX + 1] = "";
        memcpy(text, value.data, value.bytes);
        unsigned long long number = strtoull(text, NULL, 10);
        memset(value.data, 0, sizeof value.data);
        value.bytes = (uint32_t)snprintf(value.data, VALUE_MAX, "%llu", number + 1);
    }
    if (set || incr) {
        memcpy(value.key, request->key, sizeof value.key);
        value.version++;
        machine_store(m, place.pfn, place.offset, &value, sizeof value);
    }
    reply_value(request, step, &value, result);
}

void kv_step(struct machine *m, uint64_t step, const struct request *request, struct step_result *result)
{
    struct place place = place_client(m, request->id);
    struct client client;

    memcpy(&client, (const uint8_t *)machine_page(m, place.pfn) + place.offset, sizeof client);
    if (strcmp(client.id, request->id) == 0 && request->seq <= client.seq) {
        if (request->seq < client.seq)
            return;     /* an old duplicate: its answer was given and its client has moved on */
        result->reply_bytes = client.reply_bytes;
        memcpy(result->reply, client.reply, client.reply_bytes);
        return;
    }
    execute(m, step, request, result);
    memset(&client, 0, sizeof client);
    memcpy(client.id, request->id, sizeof client.id);
    client.seq = request->seq;
    client.used = step;
    client.reply_bytes = result->reply_bytes;
    memcpy(client.reply, result->reply, result->reply_bytes);
    machine_store(m, place.pfn, place.offset, &client, sizeof client);
}
