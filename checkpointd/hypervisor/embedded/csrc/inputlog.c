/* See inputlog.h. */
#include "../../../csrc/strict.h"
#include "inputlog.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stddef.h>
#include <string.h>
#include <sys/uio.h>

/* Bit by bit: entries are small and few, and a table would be one more thing to get wrong. */
static uint32_t crc32(const void *data, size_t bytes)
{
    const uint8_t *octet = data;
    uint32_t crc = ~0u;

    for (size_t i = 0; i < bytes; i++) {
        crc ^= octet[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (0xedb88320u & (0u - (crc & 1u)));
    }
    return ~crc;
}

static void put_sender(struct input_entry *entry, const struct sockaddr_storage *from)
{
    if (from->ss_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)from;
        memcpy(entry->address, &v6->sin6_addr, 16);
        entry->port = ntohs(v6->sin6_port);
    } else {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)from;
        entry->address[10] = entry->address[11] = 0xff;
        memcpy(entry->address + 12, &v4->sin_addr, 4);
        entry->port = ntohs(v4->sin_port);
    }
}

int inputlog_append(int fd, uint64_t step, uint16_t kind, const struct sockaddr_storage *from,
                    const void *data, uint32_t bytes)
{
    struct input_entry entry = { .magic = INPUT_MAGIC, .kind = kind, .step = step, .bytes = bytes };

    if (from)
        put_sender(&entry, from);
    entry.data_crc = crc32(data, bytes);
    entry.head_crc = crc32(&entry, offsetof(struct input_entry, head_crc));
    struct iovec parts[] = { { &entry, sizeof entry }, { (void *)data, bytes } };
    ssize_t n = writev(fd, parts, 2);
    if (n < 0)
        return -errno;
    return n == (ssize_t)(sizeof entry + bytes) ? 0 : -ENOSPC;
}
