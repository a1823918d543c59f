/*
 * The input log, writer's side: every input that a guest consumes, with the step that consumes it, is in the
 * log before the guest sees it. Layout and reader: inputlog.py.
 */
#ifndef EMBEDDED_INPUTLOG_H
#define EMBEDDED_INPUTLOG_H

#include <stdint.h>
#include <sys/socket.h>

#define INPUT_MAGIC 0x4e494b43u     /* "CKIN" */

struct input_entry {
    uint32_t magic;
    uint16_t kind;          /* enum step_kind */
    uint16_t port;          /* of the sender, host order; 0 for an order to the balloon */
    uint64_t step;          /* the step that consumes it */
    uint8_t address[16];    /* of the sender, IPv6 or v4-mapped */
    uint32_t bytes;         /* of data, which follows */
    /* CRC-32 (IEEE 802.3). Two of them, so that a torn entry, whose head is sound and whose data is short, is
     * told from a damaged one. */
    uint32_t data_crc;
    uint32_t head_crc;      /* of this struct up to here */
    uint32_t reserved;
};

/* Append an entry in one write; `from` may be NULL. Negative errno if it is not wholly written. */
int inputlog_append(int fd, uint64_t step, uint16_t kind, const struct sockaddr_storage *from,
                    const void *data, uint32_t bytes);

#endif
