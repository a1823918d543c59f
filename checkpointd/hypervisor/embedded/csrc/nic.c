/* See nic.h. */
#include "../../../csrc/strict.h"
#include "nic.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct packet {
    struct packet *next;
    uint64_t epoch;         /* 0: sent while the output was open */
    struct sockaddr_storage to;
    socklen_t to_bytes;
    uint32_t bytes;
    uint8_t data[];
};

int nic_init(struct nic *nic, int udp, uint64_t limit_bytes, struct control *c, struct fault_rules *faults)
{
    memset(nic, 0, sizeof *nic);
    nic->udp = udp;
    nic->control = c;
    nic->faults = faults;
    nic->tail = &nic->head;
    pthread_mutex_init(&nic->lock, NULL);
    STORE(c->limit_bytes, limit_bytes);
    STORE(c->open_epoch, 1);
    nic->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return nic->wake < 0 ? -errno : 0;
}

/* Take the first packet if it may leave. Packets queued later have the same or a later epoch. */
static struct packet *take(struct nic *nic)
{
    struct control *c = nic->control;

    pthread_mutex_lock(&nic->lock);
    struct packet *packet = nic->head;
    if (packet && packet->epoch > LOAD(c->released))
        packet = NULL;
    if (packet) {
        nic->head = packet->next;
        if (!nic->head)
            nic->tail = &nic->head;
        STORE(c->held_packets, c->held_packets - 1);
        STORE(c->held_bytes, c->held_bytes - sizeof *packet - packet->bytes);
        STORE(c->released_packets, c->released_packets + 1);
    }
    pthread_mutex_unlock(&nic->lock);
    return packet;
}

static void send_packet(struct nic *nic, const struct packet *packet)
{
    for (;;) {
        ssize_t n = sendto(nic->udp, packet->data, packet->bytes, MSG_NOSIGNAL,
                           (const struct sockaddr *)&packet->to, packet->to_bytes);
        if (n >= 0 || (errno != EAGAIN && errno != EINTR))
            return;     /* sent, or the network refused it: then it is lost, as UDP may be */
        struct pollfd writable = { .fd = nic->udp, .events = POLLOUT };
        poll(&writable, 1, -1);
    }
}

static void *transmit(void *argument)
{
    struct nic *nic = argument;
    struct packet *packet;
    bool stopping;

    do {
        struct pollfd wake = { .fd = nic->wake, .events = POLLIN };
        poll(&wake, 1, -1);
        event_drain(nic->wake);
        stopping = LOAD(nic->stopping);
        while ((packet = take(nic))) {
            fault_pass(nic->faults, FAULT_HOST_RELEASE);
            send_packet(nic, packet);
            free(packet);
        }
    } while (!stopping);
    return NULL;
}

int nic_start(struct nic *nic)
{
    int rc = pthread_create(&nic->thread, NULL, transmit, nic);

    nic->running = rc == 0;
    return -rc;
}

void nic_stop(struct nic *nic)
{
    if (nic->running) {
        STORE(nic->stopping, true);
        event_signal(nic->wake);
        pthread_join(nic->thread, NULL);
        nic->running = false;
    }
    while (nic->head) {
        struct packet *packet = nic->head;
        nic->head = packet->next;
        free(packet);
    }
    close(nic->udp);
    close(nic->wake);
    pthread_mutex_destroy(&nic->lock);
}

void nic_send(struct nic *nic, const struct sockaddr_storage *to, socklen_t to_bytes,
              const void *data, uint32_t bytes)
{
    struct control *c = nic->control;
    struct packet *packet = malloc(sizeof *packet + bytes);

    pthread_mutex_lock(&nic->lock);
    if (!packet || c->held_bytes + sizeof *packet + bytes > c->limit_bytes) {
        STORE(c->dropped_packets, c->dropped_packets + 1);
        free(packet);
    } else {
        packet->next = NULL;
        packet->epoch = LOAD(c->shut) ? LOAD(c->open_epoch) : 0;
        packet->to = *to;
        packet->to_bytes = to_bytes;
        packet->bytes = bytes;
        memcpy(packet->data, data, bytes);
        *nic->tail = packet;
        nic->tail = &packet->next;
        STORE(c->held_packets, c->held_packets + 1);
        STORE(c->held_bytes, c->held_bytes + sizeof *packet + bytes);
    }
    pthread_mutex_unlock(&nic->lock);
    event_signal(nic->wake);
}

void nic_open(struct nic *nic)
{
    pthread_mutex_lock(&nic->lock);
    STORE(nic->control->shut, 0);
    for (struct packet *packet = nic->head; packet; packet = packet->next)
        packet->epoch = 0;
    pthread_mutex_unlock(&nic->lock);
    event_signal(nic->wake);
}
