/*
 * The digest: a keyed universal hash of 128 bits, fast enough for the pause and of no use to a
 * sender who does not know the key. The key is secret and lives as long as one session, so a guest
 * cannot aim at a collision. It is not a signature: whoever knows the key can make collisions at
 * will.
 *
 * For the key words k[0..1027] (u32), the points r_0, r_1 < p = 2^61 - 1, and pass j in {0, 1}:
 *
 *   h_j = 1
 *   for each block of 4096 octets, read as 1024 u32 m[], the last block filled up with zeros:
 *       nh  = sum over i < 512 of (m[2i] + k[2i+4j] mod 2^32) * (m[2i+1] + k[2i+1+4j] mod 2^32),
 *             mod 2^64
 *       h_j = h_j * r_j + (nh >> 32)            mod p
 *       h_j = h_j * r_j + (nh & 0xffffffff)     mod p
 *   h_j = h_j * r_j + length in octets          mod p
 *
 * and the digest is h_0, h_1 as two little endian u64. NH, with the key shifted by four words for
 * the second pass, is the universal family of UMAC (RFC 4418, section 5): two blocks that differ
 * have the same pair of sums with chance 2^-64, and two different lists of n sums the same value
 * with chance (2n + 1) / p in each pass.
 */
#ifndef CHECKPOINTD_DIGEST_H
#define CHECKPOINTD_DIGEST_H

#include <stdint.h>

#include "kernel.h"

#define CK_DIGEST_SIZE 16u /* octets */

struct ck_digest_key {
    uint32_t words[CK_NH_KEY_WORDS];
    uint64_t points[2]; /* each below 2^61 - 1 */
};

void ck_digest(const struct ck_digest_key *key, const uint8_t *data, uint64_t length,
               uint8_t digest[CK_DIGEST_SIZE]);

/* The digests of nr consecutive pages: nr * CK_DIGEST_SIZE octets. */
void ck_digest_pages(const struct ck_digest_key *key, const uint8_t *pages, uint64_t nr,
                     uint8_t *digests);

/* ck_digest() by a kernel of one's choice: for comparing them. */
void ck_digest_with(const struct ck_kernel *kernel, const struct ck_digest_key *key,
                    const uint8_t *data, uint64_t length, uint8_t digest[CK_DIGEST_SIZE]);

#endif
