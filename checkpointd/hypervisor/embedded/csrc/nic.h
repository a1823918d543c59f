/*
 * The guest's network card: a UDP socket whose output is held until its epoch is released.
 *
 * Invariant 1, the guest's half: while `shut`, a datagram leaves only after the epoch that it was sent in has
 * been released. Order that keeps it: the guest thread stamps a datagram with the open epoch as it queues it;
 * output_close moves the open epoch on while the guest is stopped; the transmit thread, alone, sends, and takes
 * from the head of the queue only what is released. Nothing but nic_open() takes the shutter away, and what dies
 * with the process dies unsent.
 *
 * The queue is bounded in bytes; what does not fit is dropped and counted, never sent early.
 */
#ifndef EMBEDDED_NIC_H
#define EMBEDDED_NIC_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#include "control.h"
#include "fault.h"

struct packet;

struct nic {
    int udp;                /* owned */
    int wake;               /* eventfd: something may leave; owned, a duplicate goes to the engine */
    struct control *control;
    struct fault_rules *faults;
    pthread_mutex_t lock;   /* the queue */
    struct packet *head, **tail;
    bool stopping;
    bool running;
    pthread_t thread;
};

int nic_init(struct nic *nic, int udp, uint64_t limit_bytes, struct control *c, struct fault_rules *faults);
int nic_start(struct nic *nic);
/* Send what may leave, stop the thread, drop the rest. */
void nic_stop(struct nic *nic);
void nic_send(struct nic *nic, const struct sockaddr_storage *to, socklen_t to_bytes,
              const void *data, uint32_t bytes);
/* Let out everything, now and from now on. */
void nic_open(struct nic *nic);

#endif
