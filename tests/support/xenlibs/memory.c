/*
 * The guest's frames lie in a memfd. Kept from the real thing, since the tests are about it: a mapping pins the frames
 * of its time; a pinned frame is charged to the guest (tot_pages) and not used again. Touching a hole in a mapping is a
 * SIGSEGV.
 */
#include "xen.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_FRAMES 4096
#define MAPS 16
#define XEN_XTAB 0xf0000000ul /* XEN_DOMCTL_PFINFO_XTAB: there is nothing */

static int memory = -1;
static uint8_t *frames; /* our own view of it */
static uint64_t nr_frames;
static int64_t p2m[MAX_PFNS];     /* frame, or -1 */
static uint32_t uses[MAX_FRAMES]; /* of a frame: by the p2m, and by each mapping that pins it */
static struct { uint8_t *base; uint32_t count; int64_t frame[CK_EXTENT_PAGES]; } maps[MAPS];

static void use(int64_t frame)
{
    guest.tot_pages += uses[frame]++ == 0;
}

void fake_let_go(int64_t frame)
{
    guest.tot_pages -= --uses[frame] == 0;
}

void fake_memory_reset(uint64_t nr)
{
    if (guest.nr_pfns > MAX_PFNS || nr > MAX_FRAMES || nr / 2 > guest.nr_pfns)
        abort();
    if (frames) {
        munmap(frames, nr_frames * PAGE);
        close(memory);
    }
    nr_frames = nr;
    memory = memfd_create("frames", MFD_CLOEXEC);
    if (memory < 0 || ftruncate(memory, (off_t)(nr * PAGE)))
        abort();
    frames = mmap(NULL, nr * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (frames == MAP_FAILED)
        abort();
    memset(uses, 0, sizeof uses);
    memset(maps, 0, sizeof maps);
    for (uint64_t pfn = 0; pfn < MAX_PFNS; pfn++) {
        p2m[pfn] = pfn < nr / 2 ? (int64_t)pfn : -1;
        if (p2m[pfn] >= 0)
            use(p2m[pfn]);
    }
}

/* ------------------------------------------------------------ the guest's own doing */

bool fake_has_page(uint64_t pfn)
{
    return pfn < MAX_PFNS && p2m[pfn] >= 0;
}

uint8_t *fake_page(uint64_t pfn)
{
    return fake_has_page(pfn) ? frames + (uint64_t)p2m[pfn] * PAGE : NULL;
}

int64_t fake_value(uint64_t pfn)
{
    int64_t value = -1;

    if (fake_has_page(pfn))
        memcpy(&value, fake_page(pfn), sizeof value);
    return value;
}

void fake_write(uint64_t pfn, int64_t value)
{
    if (!fake_has_page(pfn))
        return;
    memcpy(fake_page(pfn), &value, sizeof value);
    fake_dirty(pfn);
}

int64_t fake_page_out(uint64_t pfn)
{
    int64_t frame = p2m[pfn];

    p2m[pfn] = -1;
    return frame;
}

void fake_take(uint64_t pfn)
{
    if (fake_has_page(pfn))
        fake_let_go(fake_page_out(pfn));
}

bool fake_give(uint64_t pfn, int64_t value)
{
    int64_t frame = 0;

    if (fake_has_page(pfn))
        return false;
    while (uses[frame])
        if (++frame == (int64_t)nr_frames)
            return false;
    memset(frames + frame * PAGE, 0, PAGE);
    use(frame);
    p2m[pfn] = frame;
    fake_log_new_page(pfn);
    fake_write(pfn, value);
    return true;
}

/* ------------------------------------------------------------ libxenctrl */

static void meanwhile(enum call call)
{
    guest.calls[call]++;
    if (fake_meanwhile)
        fake_meanwhile(call);
}

int xc_domain_nr_gpfns(struct xen_ctrl *c, uint32_t domid, unsigned long *nr)
{
    *nr = guest.nr_pfns;
    return guest.gone ? set_errno(ESRCH) : 0;
}

int xc_domain_decrease_reservation_exact(struct xen_ctrl *c, uint32_t domid, unsigned long nr, unsigned order,
                                         unsigned long *pfns)
{
    for (unsigned long i = 0; i < nr; i++)
        if (!fake_has_page(pfns[i]))
            return set_errno(EBUSY);
    for (unsigned long i = 0; i < nr; i++)
        fake_take(pfns[i]);
    return 0;
}

int xc_get_pfn_type_batch(struct xen_ctrl *c, uint32_t domid, unsigned n, unsigned long *pfns)
{
    if (n > 1024)
        return set_errno(E2BIG);
    guest.pfns_asked += n;
    for (unsigned i = 0; i < n; i++)
        pfns[i] = fake_has_page(pfns[i]) ? 0 : XEN_XTAB;
    meanwhile(TYPES);
    return 0;
}

/* ------------------------------------------------------------ libxenforeignmemory */

struct xen_memory *xenforeignmemory_open(struct xen_logger *l, unsigned flags)
{
    return HANDLE;
}

int xenforeignmemory_close(struct xen_memory *m)
{
    return 0;
}

void *xenforeignmemory_map(struct xen_memory *m, uint32_t domid, int prot, size_t n, const unsigned long *pfns,
                           int *errors)
{
    int i = 0;

    if (guest.fail_map || prot != PROT_READ) {
        errno = guest.fail_map ? guest.fail_map : EINVAL;
        guest.fail_map = 0;
        return NULL;
    }
    while (maps[i].base)
        if (++i == MAPS)
            abort();
    maps[i].base = mmap(NULL, n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    maps[i].count = (uint32_t)n;
    for (size_t p = 0; p < n; p++) {
        int64_t frame = p2m[pfns[p]];

        errors[p] = frame < 0 ? -EINVAL : 0;
        maps[i].frame[p] = frame;
        if (frame < 0)
            continue;
        use(frame);
        mmap(maps[i].base + p * PAGE, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, memory, frame * PAGE);
    }
    guest.mapped++;
    meanwhile(MAP);
    return maps[i].base;
}

int xenforeignmemory_unmap(struct xen_memory *m, void *base, size_t n)
{
    for (int i = 0; i < MAPS; i++) {
        if (maps[i].base != base || maps[i].count != n)
            continue;
        for (size_t p = 0; p < n; p++)
            if (maps[i].frame[p] >= 0)
                fake_let_go(maps[i].frame[p]);
        munmap(base, n * PAGE);
        maps[i].base = NULL;
        guest.mapped--;
        return 0;
    }
    return set_errno(EINVAL); /* privcmd: the whole of what one call mapped, or nothing */
}
