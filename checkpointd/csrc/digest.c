#include "strict.h"
#include "digest.h"

#include <string.h>

#include "hypervisor.h"

#define PRIME ((UINT64_C(1) << 61) - 1)

__extension__ typedef unsigned __int128 wide; /* of GNU C, which -Wpedantic wants to be told */

/* h * r + x mod p, for h, r < p and x < 2^61. Since 2^61 = 1 mod p, the bits above the 61st are
 * added to those below: the product is below 2^122 + 2^61, so one fold leaves less than 2^62 and
 * one subtraction ends it. */
static uint64_t step(uint64_t h, uint64_t r, uint64_t x)
{
    wide product = (wide)h * r + x;
    uint64_t folded = ((uint64_t)product & PRIME) + (uint64_t)(product >> 61);

    return folded >= PRIME ? folded - PRIME : folded;
}

static void add_block(const struct ck_kernel *kernel, const struct ck_digest_key *key,
                      const uint8_t *block, uint64_t h[2])
{
    uint64_t sums[2];

    kernel->nh(key->words, block, sums);
    for (int j = 0; j < 2; j++) {
        h[j] = step(h[j], key->points[j], sums[j] >> 32);
        h[j] = step(h[j], key->points[j], sums[j] & UINT32_MAX);
    }
}

void ck_digest_with(const struct ck_kernel *kernel, const struct ck_digest_key *key,
                    const uint8_t *data, uint64_t length, uint8_t digest[CK_DIGEST_SIZE])
{
    uint64_t h[2] = {1, 1}, at = 0;

    for (; length - at >= CK_NH_BLOCK; at += CK_NH_BLOCK)
        add_block(kernel, key, data + at, h);
    if (at < length) {
        uint8_t last[CK_NH_BLOCK] = {0};

        memcpy(last, data + at, length - at);
        add_block(kernel, key, last, h);
    }
    for (int j = 0; j < 2; j++)
        h[j] = step(h[j], key->points[j], length % PRIME);
    memcpy(digest, h, CK_DIGEST_SIZE);
}

void ck_digest(const struct ck_digest_key *key, const uint8_t *data, uint64_t length,
               uint8_t digest[CK_DIGEST_SIZE])
{
    ck_digest_with(ck_kernel, key, data, length, digest);
}

void ck_digest_pages(const struct ck_digest_key *key, const uint8_t *pages, uint64_t nr,
                     uint8_t *digests)
{
    for (uint64_t i = 0; i < nr; i++)
        ck_digest(key, pages + i * CK_PAGE_SIZE, CK_PAGE_SIZE, digests + i * CK_DIGEST_SIZE);
}
