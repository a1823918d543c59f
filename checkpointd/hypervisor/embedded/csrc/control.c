/* See control.h. */
#include "../../../csrc/strict.h"
#include "control.h"

#include <unistd.h>

void control_read_stats(struct control *c, struct control_stats *stats)
{
    const uint64_t *populated = control_populated(c);
    uint64_t words = bitmap_words(c->nr_pfns);

    stats->held_packets = LOAD(c->held_packets);
    stats->held_bytes = LOAD(c->held_bytes);
    stats->limit_bytes = LOAD(c->limit_bytes);
    stats->dropped_packets = LOAD(c->dropped_packets);
    stats->released_packets = LOAD(c->released_packets);
    stats->step = LOAD(c->step);
    stats->shut = LOAD(c->shut);
    stats->paused = LOAD(c->paused);
    stats->ended = LOAD(c->ended);
    stats->log_on = LOAD(c->log_on);
    stats->ram_pages = 0;
    for (uint64_t w = 0; w < words; w++)
        stats->ram_pages += (uint64_t)__builtin_popcountll(LOAD(populated[w]));
}

void event_signal(int fd)
{
    uint64_t one = 1;

    /* It can only fail when the counter is full, and then the fd is readable as it should be. */
    if (write(fd, &one, sizeof one) < 0) { }
}

void event_drain(int fd)
{
    uint64_t count;

    if (read(fd, &count, sizeof count) < 0) { }    /* EAGAIN: nobody signalled */
}
