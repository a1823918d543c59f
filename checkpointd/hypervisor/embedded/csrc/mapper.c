/* See mapper.h. */
#include "../../../csrc/strict.h"
#include "mapper.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static int map_slot(struct mapper *mapper, const struct mapper_request *request, struct mapper_reply *reply)
{
    struct machine *m = mapper->machine;

    if (request->slot >= mapper->nr_slots || request->count == 0 || request->count > CK_EXTENT_PAGES
        || request->first_pfn >= m->nr_pfns || request->count > m->nr_pfns - request->first_pfn)
        return -EINVAL;
    if (mapper->slots[request->slot])
        return -EBUSY;
    uint32_t *slot = malloc((1 + request->count) * sizeof *slot);
    if (!slot)
        return -ENOMEM;
    slot[0] = request->count;
    machine_map(m, request->first_pfn, request->count, slot + 1);
    mapper->slots[request->slot] = slot;
    reply->count = request->count;
    for (uint32_t i = 0; i < request->count; i++)
        reply->frames[i] = slot[1 + i];
    return 0;
}

static int unmap_slot(struct mapper *mapper, uint32_t index)
{
    if (index >= mapper->nr_slots || !mapper->slots[index])
        return -EINVAL;
    uint32_t *slot = mapper->slots[index];
    machine_unmap(mapper->machine, slot + 1, slot[0]);
    free(slot);
    mapper->slots[index] = NULL;
    return 0;
}

static void *serve(void *argument)
{
    struct mapper *mapper = argument;
    struct mapper_request request;
    struct mapper_reply reply;
    ssize_t n;

    while ((n = recv(mapper->socket, &request, sizeof request, 0)) > 0 || (n < 0 && errno == EINTR)) {
        if (n != (ssize_t)sizeof request)
            continue;
        reply.count = 0;
        reply.tag = request.tag;
        if (request.op == MAPPER_MAP)
            reply.status = map_slot(mapper, &request, &reply);
        else
            reply.status = unmap_slot(mapper, request.slot);
        size_t bytes = offsetof(struct mapper_reply, frames) + reply.count * sizeof *reply.frames;
        if (send(mapper->socket, &reply, bytes, MSG_NOSIGNAL) < 0)
            break;
    }
    return NULL;
}

int mapper_start(struct mapper *mapper, struct machine *machine, int *fd)
{
    int pair[2];

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return -errno;
    mapper->machine = machine;
    mapper->nr_slots = mapper_slots(machine->nr_pfns);
    mapper->slots = calloc(mapper->nr_slots, sizeof *mapper->slots);
    mapper->socket = pair[0];
    int rc = mapper->slots ? pthread_create(&mapper->thread, NULL, serve, mapper) : ENOMEM;
    if (rc != 0) {
        free(mapper->slots);
        close(pair[0]);
        close(pair[1]);
        mapper->socket = -1;
        return -rc;
    }
    *fd = pair[1];
    return 0;
}

void mapper_stop(struct mapper *mapper)
{
    if (mapper->socket < 0)
        return;
    shutdown(mapper->socket, SHUT_RDWR);    /* ends recv() in the thread */
    pthread_join(mapper->thread, NULL);
    for (uint32_t i = 0; i < mapper->nr_slots; i++) {
        if (mapper->slots[i])
            unmap_slot(mapper, i);
    }
    free(mapper->slots);
    close(mapper->socket);
    mapper->socket = -1;
}
