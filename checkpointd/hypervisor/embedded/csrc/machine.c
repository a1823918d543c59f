/* See machine.h. */
#include "../../../csrc/strict.h"
#include "machine.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void bit_set(uint64_t *bitmap, uint64_t bit)
{
    bitmap[bit / 64] |= 1ull << (bit % 64);
}

static void bit_clear(uint64_t *bitmap, uint64_t bit)
{
    bitmap[bit / 64] &= ~(1ull << (bit % 64));
}

/* A frame that nobody owns and nobody maps reads as zeros when it comes back. */
static void release_frame(struct machine *m, uint32_t frame)
{
    off_t offset = (off_t)frame * CK_PAGE_SIZE;

    if (fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, CK_PAGE_SIZE) != 0)
        memset(m->ram + offset, 0, CK_PAGE_SIZE);   /* a file system that cannot punch */
    m->free_frames[m->nr_free++] = frame;
}

struct machine *machine_new(int fd, uint64_t nr_pfns, const uint64_t *populated, uint64_t seed)
{
    struct machine *m = calloc(1, sizeof *m);

    if (!m)
        return NULL;
    pthread_mutex_init(&m->lock, NULL);
    m->nr_pfns = nr_pfns;
    m->shuffle = seed | 1;  /* the generator must not begin at zero */
    m->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    m->ram = mmap(NULL, nr_pfns * CK_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
    if (m->ram == MAP_FAILED)
        m->ram = NULL;
    m->p2m = malloc(nr_pfns * sizeof *m->p2m);
    m->references = calloc(nr_pfns, sizeof *m->references);
    m->owned = calloc(nr_pfns, sizeof *m->owned);
    m->free_frames = malloc(nr_pfns * sizeof *m->free_frames);
    m->populated = calloc(bitmap_words(nr_pfns), sizeof *m->populated);
    if (!m->ram || !m->p2m || !m->references || !m->owned || !m->free_frames || !m->populated) {
        machine_free(m);
        return NULL;
    }
    for (uint64_t pfn = 0; pfn < nr_pfns; pfn++) {
        if (!populated || bit_test(populated, pfn)) {
            m->p2m[pfn] = (uint32_t)pfn;
            m->owned[pfn] = true;
            bit_set(m->populated, pfn);
        } else {
            m->p2m[pfn] = FRAME_NONE;
            release_frame(m, (uint32_t)pfn);    /* an image may hold old bytes where nothing is */
        }
    }
    return m;
}

void machine_free(struct machine *m)
{
    if (m->ram)
        munmap(m->ram, m->nr_pfns * CK_PAGE_SIZE);
    if (m->fd >= 0)
        close(m->fd);
    if (!m->control)
        free(m->populated);
    free(m->p2m);
    free(m->references);
    free(m->owned);
    free(m->free_frames);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

void machine_share(struct machine *m, struct control *c)
{
    memcpy(control_populated(c), m->populated, bitmap_words(m->nr_pfns) * 8);
    free(m->populated);
    m->populated = control_populated(c);
    m->control = c;
}

const void *machine_page(const struct machine *m, uint64_t pfn)
{
    if (pfn >= m->nr_pfns || m->p2m[pfn] == FRAME_NONE)
        return NULL;
    return m->ram + (uint64_t)m->p2m[pfn] * CK_PAGE_SIZE;
}

void machine_store(struct machine *m, uint64_t pfn, uint32_t offset, const void *data, uint32_t bytes)
{
    if (pfn >= m->nr_pfns || m->p2m[pfn] == FRAME_NONE || offset + bytes > CK_PAGE_SIZE)
        return;
    memcpy(m->ram + (uint64_t)m->p2m[pfn] * CK_PAGE_SIZE + offset, data, bytes);
    if (m->control && m->control->log_on)
        bit_set(control_dirty(m->control), pfn);
}

bool machine_balloon_out(struct machine *m, uint64_t pfn)
{
    if (pfn >= m->nr_pfns || m->p2m[pfn] == FRAME_NONE)
        return false;
    pthread_mutex_lock(&m->lock);
    uint32_t frame = m->p2m[pfn];
    m->p2m[pfn] = FRAME_NONE;
    m->owned[frame] = false;
    if (m->references[frame] == 0)
        release_frame(m, frame);
    pthread_mutex_unlock(&m->lock);

    bit_clear(m->populated, pfn);
    if (m->control) {
        bit_clear(control_dirty(m->control), pfn);
        bit_set(control_changed(m->control), pfn);
    }
    return true;
}

/* Any free frame, so that the p2m does not stay a straight line: xorshift64 (Marsaglia, 2003). */
static uint32_t pick_free_frame(struct machine *m)
{
    m->shuffle ^= m->shuffle << 13;
    m->shuffle ^= m->shuffle >> 7;
    m->shuffle ^= m->shuffle << 17;
    uint64_t pick = m->shuffle % m->nr_free;
    uint32_t frame = m->free_frames[pick];
    m->free_frames[pick] = m->free_frames[--m->nr_free];
    return frame;
}

bool machine_balloon_in(struct machine *m, uint64_t pfn)
{
    if (pfn >= m->nr_pfns || m->p2m[pfn] != FRAME_NONE)
        return false;
    pthread_mutex_lock(&m->lock);
    bool found = m->nr_free > 0;
    if (found) {
        m->p2m[pfn] = pick_free_frame(m);
        m->owned[m->p2m[pfn]] = true;
    }
    pthread_mutex_unlock(&m->lock);
    if (!found)
        return false;

    bit_set(m->populated, pfn);
    if (m->control) {
        if (m->control->log_on)
            bit_set(control_dirty(m->control), pfn);
        bit_set(control_changed(m->control), pfn);
    }
    return true;
}

uint64_t machine_free_frames(struct machine *m)
{
    pthread_mutex_lock(&m->lock);
    uint64_t nr = m->nr_free;
    pthread_mutex_unlock(&m->lock);
    return nr;
}

void machine_map(struct machine *m, uint64_t first_pfn, uint32_t count, uint32_t *frames)
{
    pthread_mutex_lock(&m->lock);
    for (uint32_t i = 0; i < count; i++) {
        frames[i] = m->p2m[first_pfn + i];
        if (frames[i] != FRAME_NONE)
            m->references[frames[i]]++;
    }
    pthread_mutex_unlock(&m->lock);
}

void machine_unmap(struct machine *m, const uint32_t *frames, uint32_t count)
{
    pthread_mutex_lock(&m->lock);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t frame = frames[i];

        if (frame != FRAME_NONE && --m->references[frame] == 0 && !m->owned[frame])
            release_frame(m, frame);
    }
    pthread_mutex_unlock(&m->lock);
}

void machine_compare(const struct machine *m, const uint8_t *image, uint64_t *different)
{
    for (uint64_t pfn = 0; pfn < m->nr_pfns; pfn++) {
        const void *page = machine_page(m, pfn);

        if (page && memcmp(page, image + pfn * CK_PAGE_SIZE, CK_PAGE_SIZE) != 0)
            bit_set(different, pfn);
    }
}
