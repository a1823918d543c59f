/*
 * The guest: a program whose every act is one step, and whose whole state is its RAM.
 *
 * A step is a function of RAM and of its input, if it has one (a datagram, or an order to the balloon
 * driver): no clock, no randomness, no other memory. The number of the last step lies in RAM. So the same
 * input at the same steps gives the same RAM, bit for bit, on any host: that is what replay compares with.
 */
#ifndef EMBEDDED_GUEST_H
#define EMBEDDED_GUEST_H

#include "machine.h"

enum step_kind {
    STEP_TICK,          /* no input; only programs that run by themselves */
    STEP_DATAGRAM,      /* input: the datagram */
    STEP_BALLOON_OUT,   /* input: u32 pfns to give back */
    STEP_BALLOON_IN,    /* input: u32 pfns to get memory behind */
};

#define DATAGRAM_MAX 1472u  /* octets: what fits an Ethernet frame; a longer one is cut and answered "bad" */
#define REPLY_MAX 448u      /* octets; the longest answer takes about 310 */
#define PROGRAM_MAX 64u     /* octets of the program's name in RAM, with its NUL */

struct step_result {
    uint32_t reply_bytes;   /* 0: no answer */
    uint32_t end;           /* enum end_reason: the guest did this to itself */
    uint32_t changed;       /* pages that a balloon step moved */
    uint8_t reply[REPLY_MAX];
};

/* What "kv" and "dirty:PAGES@RATE" mean. */
struct program {
    uint32_t kind;          /* enum program_kind */
    uint32_t rate;          /* rewrites of each page a second; the host's business, not the guest's */
    uint64_t pages;
};
enum program_kind { PROGRAM_KV, PROGRAM_DIRTY };

/* False: not a program. RATE is 10 where it is not said. */
bool program_parse(const char *text, struct program *program);

/* Lay out fresh RAM. -EINVAL: no such program; -ENOMEM: too few pages for it. */
int guest_boot(struct machine *m, const char *program, const uint8_t uuid[16]);

/* Run one step; the machine's log_lock must be held if it has one. -EINVAL: the RAM is no guest's. */
int guest_step(struct machine *m, enum step_kind kind, const void *input, uint32_t bytes,
               struct step_result *result);

/* Run `count` steps without input, until one ends the guest. For replay. */
int guest_ticks(struct machine *m, uint64_t count);

uint64_t guest_step_number(const struct machine *m);

/* Whether the balloon driver may give this page back: not what the program keeps its state in. */
bool guest_may_balloon(const struct machine *m, uint64_t pfn);

/* The tail records of an epoch, X86_TSC_INFO and HVM_CONTEXT: bytes written, or -ENOSPC. */
int64_t guest_context(const struct machine *m, uint8_t *buffer, uint64_t capacity);

/* ---- between guest.c and the programs ---- */

#define GUEST_MAGIC "CKGUEST1"

/* The first page of RAM. */
struct guest_header {
    char magic[8];
    uint64_t step;
    uint64_t nr_pfns;
    uint64_t ballooned;     /* pages out at this step */
    uint8_t uuid[16];
    char program[PROGRAM_MAX];
    /* Pages [0, reserved_pages) hold the program's state and are never ballooned out. */
    uint64_t reserved_pages;
    uint64_t client_pages;  /* kv: from page 1; then the pages of values */
    uint64_t dirty_pages;   /* dirty: how many it rewrites */
    uint64_t dirty_stride;  /* and how far apart, so that they are scattered */
};

#define TOKEN_MAX 64u       /* octets of a client's id, a verb or a key, with its NUL */
#define VALUE_MAX 160u      /* octets of a value, without a NUL */

/* One request: "ID SEQ VERB [KEY [VALUE]]". */
struct request {
    char id[TOKEN_MAX];
    char verb[TOKEN_MAX];
    char key[TOKEN_MAX];
    uint64_t seq;
    uint32_t value_bytes;
    char value[VALUE_MAX];
};

static inline const struct guest_header *guest_header(const struct machine *m)
{
    return machine_page(m, 0);
}

int kv_boot(struct machine *m, struct guest_header *header);
/* True: answered in full (into result), from memory or by execution. */
void kv_step(struct machine *m, uint64_t step, const struct request *request, struct step_result *result);

/* The verbs that every program knows: ping, poweroff, reboot, crash. False: not one of them. */
bool common_verb(const struct request *request, uint64_t step, struct step_result *result);
void reply_error(const struct request *request, uint64_t step, const char *text,
                 struct step_result *result);

#endif
