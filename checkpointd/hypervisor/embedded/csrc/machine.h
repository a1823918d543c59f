/*
 * The machine that a guest runs on: frames of memory, a p2m over them, and the dirty log.
 *
 * A frame is a page of the memory file, a pfn is what the guest calls it, p2m[pfn] is the frame behind it.
 * At first pfn and frame are the same; what is ballooned out and in again comes back on another frame. The
 * guest pays for at most nr_pfns frames: one is free again only when no pfn is backed by it *and* no engine
 * has it mapped. Until then it is not reused and not punched out, so a mapping made before the change goes
 * on showing the old page, as on Xen, and ballooning in fails for want of frames.
 *
 * Threads: the guest thread alone stores, marks and changes the p2m. The mapper thread looks frames up and
 * counts. `lock` stands between the two; the log has its own lock, in the control page. A machine without
 * a control page (replay) has no log and one thread.
 */
#ifndef EMBEDDED_MACHINE_H
#define EMBEDDED_MACHINE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "../../../csrc/hypervisor.h"
#include "control.h"

#define FRAME_NONE UINT32_MAX   /* p2m: nothing behind this pfn */

struct machine {
    uint64_t nr_pfns;
    int fd;                     /* the memory file; owned */
    uint8_t *ram;               /* all of it, by frame */
    pthread_mutex_t lock;       /* p2m, references, free frames */
    uint32_t *p2m;
    uint32_t *references;       /* of each frame, by mappings of the engine */
    bool *owned;                /* of each frame: some pfn is backed by it */
    uint32_t *free_frames;
    uint64_t nr_free;
    uint64_t shuffle;           /* state of the generator that picks a free frame */
    uint64_t *populated;        /* bit p: something is behind pfn p; the control page's once shared */
    struct control *control;    /* NULL: no log */
};

/* Build a machine over the first nr_pfns pages of the file `fd` (duplicated). `populated`: a bit for each
 * pfn with memory behind it, NULL for all. `seed` of the order in which frames come back. NULL and errno. */
struct machine *machine_new(int fd, uint64_t nr_pfns, const uint64_t *populated, uint64_t seed);
void machine_free(struct machine *m);

/* Keep the dirty log and the populated bitmap in the control page from here on. */
void machine_share(struct machine *m, struct control *c);

/* The page behind pfn, NULL if there is none. For reading; stores go through machine_store. */
const void *machine_page(const struct machine *m, uint64_t pfn);

/* Copy into the guest's page and mark it; nothing happens where there is no page, as on real hardware.
 * The caller holds log_lock if there is a log. */
void machine_store(struct machine *m, uint64_t pfn, uint32_t offset, const void *data, uint32_t bytes);

/* Give the page behind pfn back, or put a zeroed one there. False: it was (not) there already, or no frame is
 * free. As on Xen, removing marks the pfn clean and adding marks it dirty. The caller holds log_lock. */
bool machine_balloon_out(struct machine *m, uint64_t pfn);
bool machine_balloon_in(struct machine *m, uint64_t pfn);

uint64_t machine_free_frames(struct machine *m);

/* Look up `count` pfns and count a mapping of each frame; FRAME_NONE for a hole. */
void machine_map(struct machine *m, uint64_t first_pfn, uint32_t count, uint32_t *frames);
void machine_unmap(struct machine *m, const uint32_t *frames, uint32_t count);

/* Set the bit of each populated pfn whose page is not the one at pfn * CK_PAGE_SIZE of `image`. */
void machine_compare(const struct machine *m, const uint8_t *image, uint64_t *different);

static inline bool bit_test(const uint64_t *bitmap, uint64_t bit)
{
    return bitmap[bit / 64] >> (bit % 64) & 1;
}

#endif
