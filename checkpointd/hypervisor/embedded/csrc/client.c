/* See client.h. */
#include "../../../csrc/strict.h"
#include "client.h"

#include <poll.h>
#include <stddef.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "mapper.h"

#define NANOSECONDS 1000000000ll
#define EXTENT_BYTES ((uint64_t)CK_EXTENT_PAGES * CK_PAGE_SIZE)
#define BATCH_MAX 1024u         /* pfns that one types() takes: Xen's own limit */

/* A mapping of scattered frames takes a kernel mapping for each run of them, and a process has 65530 of those
 * (vm.max_map_count by default): half for us, half for everybody else in the process. */
#define RUNS_MAX 32768u

/* A host answers within microseconds; one that is silent for this long is stopped or starved, and the engine must
 * not hang with it. */
#define ANSWER_SECONDS 1

struct client {
    struct ck_hypervisor table;
    struct control *control;
    uint64_t control_bytes;
    int memory, kick, note, wake, mapper;
    uint32_t tag;               /* of the last request to the mapper */
    struct fault_rules faults;

    /* Extents are mapped at the slots of one reserved range, so that a base address says which slot it is. */
    uint8_t *range;
    uint32_t nr_slots;
    uint32_t *free_slots;
    uint32_t nr_free;
    uint32_t *runs;             /* kernel mappings of each slot; 0: free */
    uint32_t nr_runs;
};

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * NANOSECONDS + t.tv_nsec;
}

int client_hung_up(struct client *client)
{
    struct pollfd fd = { .fd = client->mapper, .events = POLLRDHUP };

    return poll(&fd, 1, 0) > 0;
}

/* Why a call cannot be served any more: 0, -ESHUTDOWN or -EHOSTDOWN. `ended` is read after the hang-up, since a
 * host writes it before it goes. */
static int gone(struct client *client)
{
    bool hung_up = client_hung_up(client);

    if (LOAD(client->control->ended))
        return -ESHUTDOWN;
    return hung_up ? -EHOSTDOWN : 0;
}

static bool suspended(struct client *client)
{
    uint32_t request = LOAD(client->control->request);

    return request != 0 && request == LOAD(client->control->state);
}

/* ---- the table ---- */

static int hv_suspend(void *domain, int64_t timeout_ns)
{
    struct client *client = domain;
    struct control *c = client->control;
    struct pollfd fds[] = { { .fd = client->note, .events = POLLIN },
                            { .fd = client->mapper, .events = POLLRDHUP } };
    int64_t deadline = now_ns() + timeout_ns;

    if (fault_pass(&client->faults, FAULT_SUSPEND) != 0)
        return -EIO;
    if (++c->ticket == 0)
        c->ticket = 1;          /* 0 means "run" */
    uint32_t ticket = c->ticket;
    STORE(c->request, ticket);
    event_signal(client->kick);
    while (LOAD(c->state) != ticket) {
        int64_t left = deadline - now_ns();
        int rc = gone(client);

        if (rc == 0 && left <= 0)
            rc = -ETIMEDOUT;
        if (rc != 0) {
            STORE(c->request, 0);
            event_signal(client->kick);
            return rc;
        }
        struct timespec wait = { left / NANOSECONDS, left % NANOSECONDS };
        if (ppoll(fds, 2, &wait, NULL) > 0 && fds[0].revents)
            event_drain(client->note);
    }
    return 0;
}

static int hv_resume(void *domain)
{
    struct client *client = domain;

    if (fault_pass(&client->faults, FAULT_RESUME) != 0)
        return -EIO;
    STORE(client->control->request, 0);
    event_signal(client->kick);
    return gone(client);
}

static int hv_harvest(void *domain, struct ck_bitmap *bitmap, int mode)
{
    struct client *client = domain;
    struct control *c = client->control;
    int rc = -EINVAL;

    if (fault_pass(&client->faults, FAULT_HARVEST) != 0)
        return -EIO;
    if (bitmap->nr_bits != c->nr_pfns || mode < CK_HARVEST_PEEK || mode > CK_HARVEST_FINAL
        || (mode == CK_HARVEST_FINAL && !suspended(client)))
        return -EINVAL;
    log_lock(c);
    if (c->log_on) {
        ck_bitmap_take(bitmap, control_dirty(c), mode != CK_HARVEST_PEEK);
        rc = 0;
    }
    log_unlock(c);
    return rc;
}

static int64_t hv_p2m_changes(void *domain, struct ck_bitmap *bitmap)
{
    struct client *client = domain;
    struct control *c = client->control;

    if (fault_pass(&client->faults, FAULT_P2M_CHANGES) != 0)
        return -EIO;
    if (bitmap->nr_bits != c->nr_pfns)
        return -EINVAL;
    log_lock(c);
    int64_t found = (int64_t)ck_bitmap_take(bitmap, control_changed(c), true);
    log_unlock(c);
    return found;
}

static int hv_types(void *domain, uint64_t *pfns, uint32_t count)
{
    struct client *client = domain;
    const uint64_t *populated = control_populated(client->control);

    if (fault_pass(&client->faults, FAULT_TYPES) != 0)
        return -EIO;
    if (count > BATCH_MAX)
        return -E2BIG;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t pfn = pfns[i] & CK_PFN_MASK;
        bool there = pfn < client->control->nr_pfns && LOAD(populated[pfn / 64]) >> (pfn % 64) & 1;

        pfns[i] = pfn | (there ? CK_TYPE_NOTAB : CK_TYPE_XTAB) << CK_TYPE_SHIFT;
    }
    return 0;
}

/* Ask the host: its status, -ETIMEDOUT, or -EHOSTDOWN if it is going or gone. Replies to requests that were given up
 * are passed over. */
static int ask(struct client *client, struct mapper_request *request, struct mapper_reply *reply)
{
    ssize_t n;

    request->tag = ++client->tag;
    if (send(client->mapper, request, sizeof *request, MSG_NOSIGNAL) != sizeof *request)
        return -EHOSTDOWN;
    do {
        n = recv(client->mapper, reply, sizeof *reply, 0);
        if (n < 0 && errno == EAGAIN)
            return -ETIMEDOUT;
    } while ((n < 0 && errno == EINTR) || (n > 0 && reply->tag != request->tag));
    if (n < (ssize_t)offsetof(struct mapper_reply, frames)
        || n != (ssize_t)(offsetof(struct mapper_reply, frames) + reply->count * sizeof *reply->frames))
        return -EHOSTDOWN;
    return reply->status;
}

static uint8_t *slot_base(struct client *client, uint32_t slot)
{
    return client->range + slot * EXTENT_BYTES;
}

/* Runs of frames that lie side by side, and holes between them, are one kernel mapping each. */
static uint32_t count_runs(const uint32_t *frames, uint32_t count)
{
    uint32_t runs = 1;

    for (uint32_t i = 1; i < count; i++) {
        bool hole = frames[i] == FRAME_NONE;
        bool joined = hole ? frames[i - 1] == FRAME_NONE
                           : frames[i - 1] != FRAME_NONE && frames[i] == frames[i - 1] + 1;
        runs += !joined;
    }
    return runs;
}

/* Back to reserved, unreadable addresses. */
static int blank(uint8_t *base, uint64_t bytes)
{
    void *p = mmap(base, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);

    return p == MAP_FAILED ? -errno : 0;
}

/* MAP_POPULATE: the page tables are filled now, off the pause, and not by faults in it. */
static int map_runs(struct client *client, uint8_t *base, const uint32_t *frames, uint32_t count)
{
    uint32_t next;

    for (uint32_t i = 0; i < count; i = next) {
        next = i + 1;
        if (frames[i] == FRAME_NONE)
            continue;
        while (next < count && frames[next] == frames[i] + (next - i))
            next++;
        void *p = mmap(base + (uint64_t)i * CK_PAGE_SIZE, (uint64_t)(next - i) * CK_PAGE_SIZE, PROT_READ,
                       MAP_SHARED | MAP_FIXED | MAP_POPULATE, client->memory,
                       (off_t)frames[i] * CK_PAGE_SIZE);
        if (p == MAP_FAILED)
            return errno == ENOMEM ? -ENOSPC : -errno;  /* ENOMEM: the kernel's own limit of mappings */
    }
    return 0;
}

static int give_back(struct client *client, uint32_t slot)
{
    struct mapper_request request = { .op = MAPPER_UNMAP, .slot = slot };
    struct mapper_reply reply;
    int blanked = blank(slot_base(client, slot), EXTENT_BYTES);
    int rc = ask(client, &request, &reply);

    if (blanked != 0)
        return blanked;     /* the slot stays taken: something may still be seen through it */
    if (rc == -EHOSTDOWN || rc == -ETIMEDOUT)
        rc = 0;             /* nothing is seen any more; a host that is gone counts no more, a late one will */
    client->nr_runs -= client->runs[slot];
    client->runs[slot] = 0;
    client->free_slots[client->nr_free++] = slot;
    return rc;
}

static int hv_map(void *domain, uint64_t first_pfn, uint32_t count, void **base)
{
    struct client *client = domain;
    struct mapper_request request = { .op = MAPPER_MAP, .first_pfn = first_pfn, .count = count };
    struct mapper_reply reply;

    if (fault_pass(&client->faults, FAULT_MAP) != 0)
        return -EIO;
    if (client->nr_free == 0)
        return -ENOSPC;
    uint32_t slot = request.slot = client->free_slots[client->nr_free - 1];
    int rc = ask(client, &request, &reply);
    if (rc == -ETIMEDOUT) {
        /* It will map it yet. The order to unmap follows at once, so the slot is free again before its next use. */
        struct mapper_request undo = { .op = MAPPER_UNMAP, .slot = slot, .tag = ++client->tag };
        if (send(client->mapper, &undo, sizeof undo, MSG_NOSIGNAL) != sizeof undo)
            rc = -EHOSTDOWN;
    }
    if (rc != 0)
        return rc == -EHOSTDOWN && LOAD(client->control->ended) ? -ESHUTDOWN : rc;
    if (reply.count != count)
        return -EIO;
    client->nr_free--;
    client->runs[slot] = count_runs(reply.frames, count);
    client->nr_runs += client->runs[slot];
    rc = client->nr_runs > RUNS_MAX ? -ENOSPC : map_runs(client, slot_base(client, slot), reply.frames, count);
    if (rc != 0) {
        give_back(client, slot);
        return rc;
    }
    *base = slot_base(client, slot);
    return 0;
}

static int hv_unmap(void *domain, void *base, uint32_t count)
{
    struct client *client = domain;
    uint64_t offset = (uint64_t)((uint8_t *)base - client->range);

    (void)count;    /* the slot knows */
    if (fault_pass(&client->faults, FAULT_UNMAP) != 0)
        return -EIO;
    if ((uint8_t *)base < client->range || offset % EXTENT_BYTES || offset / EXTENT_BYTES >= client->nr_slots
        || client->runs[offset / EXTENT_BYTES] == 0)
        return -EINVAL;
    return give_back(client, (uint32_t)(offset / EXTENT_BYTES));
}

static int64_t hv_context(void *domain, uint8_t *buffer, uint64_t capacity)
{
    struct client *client = domain;
    struct control *c = client->control;

    if (fault_pass(&client->faults, FAULT_CONTEXT) != 0)
        return -EIO;
    if (!suspended(client))
        return -EINVAL;
    if (c->context_bytes > sizeof c->context || c->context_bytes > capacity)
        return -ENOSPC;
    memcpy(buffer, c->context, c->context_bytes);
    return c->context_bytes;
}

static int hv_output_close(void *domain, uint64_t *closed)
{
    struct client *client = domain;
    struct control *c = client->control;

    if (fault_pass(&client->faults, FAULT_OUTPUT_CLOSE) != 0)
        return -EIO;
    if (!suspended(client))
        return -EINVAL;
    *closed = LOAD(c->open_epoch);
    STORE(c->open_epoch, *closed + 1);
    STORE(c->shut, 1);
    return 0;
}

/* ---- building ---- */

struct client *client_new(int memory_fd, int control_fd, int kick, int note, int wake, int mapper)
{
    struct client *client = calloc(1, sizeof *client);
    uint64_t nr_pfns = 0;

    if (!client)
        return NULL;
    struct control *c = mmap(NULL, CONTROL_PAGE, PROT_READ, MAP_SHARED, control_fd, 0);
    if (c != MAP_FAILED) {
        nr_pfns = c->abi == CONTROL_ABI ? c->nr_pfns : 0;
        munmap(c, CONTROL_PAGE);
    }
    if (nr_pfns == 0) {
        free(client);
        errno = EPROTO;     /* a host of another version */
        return NULL;
    }
    client->control_bytes = control_bytes(nr_pfns);
    client->nr_slots = mapper_slots(nr_pfns);
    client->free_slots = calloc(client->nr_slots, sizeof *client->free_slots);
    client->runs = calloc(client->nr_slots, sizeof *client->runs);
    c = mmap(NULL, client->control_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, control_fd, 0);
    void *range = mmap(NULL, client->nr_slots * EXTENT_BYTES, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!client->free_slots || !client->runs || c == MAP_FAILED || range == MAP_FAILED) {
        int error = errno;
        if (c != MAP_FAILED)
            munmap(c, client->control_bytes);
        if (range != MAP_FAILED)
            munmap(range, client->nr_slots * EXTENT_BYTES);
        free(client->free_slots);
        free(client->runs);
        free(client);
        errno = error;
        return NULL;
    }
    client->control = c;
    client->range = range;
    for (uint32_t slot = client->nr_slots; slot-- > 0; )
        client->free_slots[client->nr_free++] = slot;
    client->memory = memory_fd;
    client->kick = kick;
    client->note = note;
    client->wake = wake;
    client->mapper = mapper;
    struct timeval patience = { .tv_sec = ANSWER_SECONDS };
    setsockopt(mapper, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    close(control_fd);
    client->table = (struct ck_hypervisor){
        .abi = CK_HYPERVISOR_ABI, .size = sizeof client->table, .domain = client,
        .suspend = hv_suspend, .resume = hv_resume, .harvest = hv_harvest, .p2m_changes = hv_p2m_changes,
        .types = hv_types, .map = hv_map, .unmap = hv_unmap, .context = hv_context,
        .output_close = hv_output_close,
    };
    return client;
}

void client_free(struct client *client)
{
    munmap(client->range, client->nr_slots * EXTENT_BYTES);
    munmap(client->control, client->control_bytes);
    close(client->memory);
    close(client->kick);
    close(client->note);
    close(client->wake);
    close(client->mapper);
    free(client->free_slots);
    free(client->runs);
    free(client);
}

struct ck_hypervisor *client_table(struct client *client)
{
    return &client->table;
}

struct control *client_control(struct client *client)
{
    return client->control;
}

int client_add_fault(struct client *client, const struct fault_rule *rule)
{
    return fault_add(&client->faults, rule);
}

void client_release(struct client *client, uint64_t closed)
{
    struct control *c = client->control;

    /* Never beyond what was closed, never back. */
    if (closed >= LOAD(c->open_epoch))
        closed = LOAD(c->open_epoch) - 1;
    if (closed > LOAD(c->released))
        STORE(c->released, closed);
    event_signal(client->wake);
}
