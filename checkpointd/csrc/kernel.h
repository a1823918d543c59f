/*
 * Kernels: the inner loops worth vector instructions, once in plain C (the reference) and
 * once for each instruction set. All kernels give bit-identical results; self_test() and the tests
 * compare them.
 *
 * A kernel is chosen once, at import, by ck_kernel_choose(); the rest of the code calls through
 * ck_kernel.
 */
#ifndef CHECKPOINTD_KERNEL_H
#define CHECKPOINTD_KERNEL_H

#include <stdbool.h>
#include <stdint.h>

/* Octets hashed by one NH step, and u32 words of key it takes: one for each u32 of the block, and
 * four more because the second pass uses the same key shifted by four words (Toeplitz; see
 * digest.h). */
#define CK_NH_BLOCK 4096u
#define CK_NH_KEY_WORDS (CK_NH_BLOCK / 4 + 4)

/* Octets of a line, the unit in which changes are looked for: a cache line; of what the changes of a page
 * take at most, beyond which the page itself travels: at half of it the pfn words and the codec behind gain more
 * than the rest of the changes; and of the memory for that, which a last line may overrun. */
#define CK_LINE 64u
#define CK_CHANGES_MAX 2048u
#define CK_CHANGES_ROOM (CK_CHANGES_MAX + 1 + CK_LINE)

struct ck_kernel {
    const char *name;

    /* One page (4096 octets, any alignment) all zero? */
    bool (*page_is_zero)(const uint8_t *page);

    /* Both NH sums of one whole block of any alignment. */
    void (*nh)(const uint32_t key[CK_NH_KEY_WORDS], const uint8_t *block, uint64_t sums[2]);

    /* Set bits in nr_words words. */
    uint64_t (*count)(const uint64_t *words, uint64_t nr_words);

    /* One page to where this thread does not read it soon; `to` is page aligned. Others see it
     * after the next copied(). */
    void (*copy_page)(uint8_t *to, const uint8_t *from);
    void (*copied)(void);

    /* The changes from `was` to `now`, as delta.h says, to `out` (CK_CHANGES_ROOM octets); returns how many
     * octets, and `was` is as `now` then. 0: more than CK_CHANGES_MAX, and `was` is neither. Both are page
     * aligned or not. */
    uint32_t (*changes)(uint8_t *was, const uint8_t *now, uint8_t *out);
};

/* Kernel 0 is the scalar reference; NULL beyond the last. A kernel listed here may still be more
 * than this CPU can run: ask ck_kernel_runs(). */
const struct ck_kernel *ck_kernel_at(unsigned index);
bool ck_kernel_runs(unsigned index);
const char *ck_kernel_name(unsigned index);

/* The one in use; the scalar one until ck_kernel_choose(), whose index must be one that runs. */
extern const struct ck_kernel *ck_kernel;
void ck_kernel_choose(unsigned index);

#endif
