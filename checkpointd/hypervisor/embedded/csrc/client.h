/*
 * The engine's end: fills a struct ck_hypervisor that talks to an embedded host.
 *
 * What the pause calls is shared memory (control.h); mapping asks the host over a socket which frames are
 * behind the pfns, and maps exactly those, read-only. Death of the host shows as the hang-up of that socket.
 */
#ifndef EMBEDDED_CLIENT_H
#define EMBEDDED_CLIENT_H

#include "../../../csrc/hypervisor.h"
#include "control.h"
#include "fault.h"

struct client;

/* `memory_fd` read-only, `control_fd`, `kick`, `note`, `wake` (eventfds) and `mapper` (socket) as the host sent
 * them; the client takes them over. NULL and errno on failure, they are then still the caller's. */
struct client *client_new(int memory_fd, int control_fd, int kick, int note, int wake, int mapper);
void client_free(struct client *client);

struct ck_hypervisor *client_table(struct client *client);
struct control *client_control(struct client *client);

/* Add a rule to those of the table's functions; -ENOSPC if there are too many. */
int client_add_fault(struct client *client, const struct fault_rule *rule);

/* Let out the epochs up to and including `closed`. Never waits. */
void client_release(struct client *client, uint64_t closed);

/* 1 once the host has hung up, else 0. */
int client_hung_up(struct client *client);

#endif
