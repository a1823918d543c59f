/* See guest.h. The steps common to all programs, and the program `dirty`. */
#include "../../../csrc/strict.h"
#include "guest.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DIRTY_RATE 10u          /* rewrites a second where none is given */
#define LINE 64u                /* octets that one step of `dirty` writes: a cache line */

bool program_parse(const char *text, struct program *program)
{
    char *end;

    memset(program, 0, sizeof *program);
    if (strlen(text) >= PROGRAM_MAX)
        return false;
    if (strcmp(text, "kv") == 0) {
        program->kind = PROGRAM_KV;
        return true;
    }
    if (strncmp(text, "dirty:", 6) != 0 || text[6] < '1' || text[6] > '9')
        return false;
    program->kind = PROGRAM_DIRTY;
    program->pages = strtoull(text + 6, &end, 10);
    program->rate = DIRTY_RATE;
    if (*end == '@') {
        if (end[1] < '1' || end[1] > '9')
            return false;
        program->rate = (uint32_t)strtoul(end + 1, &end, 10);
    }
    return *end == '\0';
}

/* A stride near the golden section of the memory visits it evenly; coprime to `span`, it visits each page once. */
static uint64_t scattering_stride(uint64_t span)
{
    uint64_t stride = span * 618 / 1000 | 1;

    for (;; stride++) {
        uint64_t a = span, b = stride;
        while (b) {
            uint64_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1)
            return stride;
    }
}

int guest_boot(struct machine *m, const char *text, const uint8_t uuid[16])
{
    struct guest_header header = { .magic = GUEST_MAGIC, .nr_pfns = m->nr_pfns, .reserved_pages = 1 };
    struct program program;
    int rc = 0;

    if (!program_parse(text, &program))
        return -EINVAL;
    memcpy(header.uuid, uuid, sizeof header.uuid);
    strcpy(header.program, text);
    if (program.kind == PROGRAM_DIRTY) {
        if (program.pages >= m->nr_pfns)
            return -ENOMEM;
        header.dirty_pages = program.pages;
        header.dirty_stride = scattering_stride(m->nr_pfns - 1);
    } else {
        rc = kv_boot(m, &header);
    }
    if (rc == 0)
        machine_store(m, 0, 0, &header, sizeof header);
    return rc;
}

/* splitmix64 (Steele, Lea, Flood 2014): the bytes that `dirty` writes differ at every step. */
static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static void dirty_step(struct machine *m, const struct guest_header *header, uint64_t step)
{
    uint64_t index = step % header->dirty_pages;
    uint64_t pfn = 1 + index * header->dirty_stride % (m->nr_pfns - 1);
    uint32_t line = (uint32_t)(step / header->dirty_pages % (CK_PAGE_SIZE / LINE));
    uint64_t data[LINE / 8];

    for (uint32_t i = 0; i < LINE / 8; i++)
        data[i] = mix(step * (LINE / 8) + i);
    machine_store(m, pfn, line * LINE, data, LINE);
}

static bool token(const char **cursor, const char *end, char out[TOKEN_MAX])
{
    const char *from = *cursor;
    const char *to = from;

    while (to < end && *to > ' ' && *to < 0x7f)
        to++;
    size_t length = (size_t)(to - from);
    if (length == 0 || length >= TOKEN_MAX || (to < end && *to != ' '))
        return false;
    memset(out, 0, TOKEN_MAX);
    memcpy(out, from, length);
    *cursor = to < end ? to + 1 : to;
    return true;
}

static bool parse_request(const char *text, uint32_t bytes, struct request *request)
{
    const char *cursor = text;
    const char *end = text + bytes;
    char number[TOKEN_MAX];

    memset(request, 0, sizeof *request);
    while (end > text && (end[-1] == '\n' || end[-1] == '\r' || end[-1] == ' '))
        end--;
    if (bytes >= DATAGRAM_MAX || !token(&cursor, end, request->id) || !token(&cursor, end, number)
        || !token(&cursor, end, request->verb))
        return false;
    if (strspn(number, "0123456789") != strlen(number) || strlen(number) > 18)
        return false;
    request->seq = strtoull(number, NULL, 10);
    if (cursor < end && !token(&cursor, end, request->key))
        return false;
    if ((uint64_t)(end - cursor) > VALUE_MAX)
        return false;
    request->value_bytes = (uint32_t)(end - cursor);
    memcpy(request->value, cursor, request->value_bytes);
    return true;
}

static void reply(const struct request *request, uint64_t step, const char *rest,
                  struct step_result *result)
{
    result->reply_bytes = (uint32_t)snprintf((char *)result->reply, REPLY_MAX, "%s %llu %llu %s",
                                             request->id, (unsigned long long)request->seq,
                                             (unsigned long long)step, rest);
}

void reply_error(const struct request *request, uint64_t step, const char *text,
                 struct step_result *result)
{
    char rest[TOKEN_MAX];

    snprintf(rest, sizeof rest, "err %s", text);
    reply(request, step, rest, result);
}

bool common_verb(const struct request *request, uint64_t step, struct step_result *result)
{
    static const struct { const char *verb; uint32_t end; } verbs[] = {
        { "ping", END_NONE }, { "poweroff", END_POWEROFF }, { "reboot", END_REBOOT }, { "crash", END_CRASH },
    };

    for (size_t i = 0; i < sizeof verbs / sizeof *verbs; i++) {
        if (strcmp(request->verb, verbs[i].verb) == 0) {
            result->end = verbs[i].end;
            reply(request, step, "ok", result);
            return true;
        }
    }
    return false;
}

static void datagram_step(struct machine *m, uint64_t step, const void *input, uint32_t bytes,
                          struct step_result *result)
{
    struct request request;

    if (!parse_request(input, bytes, &request)) {
        strcpy(request.id, "?");
        reply_error(&request, step, "bad request", result);
    } else if (guest_header(m)->dirty_pages == 0) {
        kv_step(m, step, &request, result);
    } else if (!common_verb(&request, step, result)) {
        reply_error(&request, step, "unknown verb", result);
    }
}

/* The order may name pages that cannot be moved (twice the same, already there): they are passed over. */
static void balloon_step(struct machine *m, bool in, const uint8_t *input, uint32_t bytes,
                         struct step_result *result)
{
    for (uint32_t at = 0; at + 4 <= bytes; at += 4) {
        uint32_t pfn;

        memcpy(&pfn, input + at, 4);
        if (in)
            result->changed += machine_balloon_in(m, pfn);
        else if (guest_may_balloon(m, pfn))
            result->changed += machine_balloon_out(m, pfn);
    }
}

int guest_step(struct machine *m, enum step_kind kind, const void *input, uint32_t bytes,
               struct step_result *result)
{
    const struct guest_header *header = guest_header(m);

    memset(result, 0, offsetof(struct step_result, reply));
    if (!header || memcmp(header->magic, GUEST_MAGIC, 8) != 0 || header->nr_pfns != m->nr_pfns)
        return -EINVAL;
    uint64_t step = header->step + 1;
    uint64_t ballooned = header->ballooned;

    switch (kind) {
    case STEP_TICK:
        if (header->dirty_pages == 0)
            return -EINVAL;
        dirty_step(m, header, step);
        break;
    case STEP_DATAGRAM:
        datagram_step(m, step, input, bytes, result);
        break;
    case STEP_BALLOON_OUT:
        balloon_step(m, false, input, bytes, result);
        ballooned += result->changed;
        break;
    case STEP_BALLOON_IN:
        balloon_step(m, true, input, bytes, result);
        ballooned -= result->changed;
        break;
    default:
        return -EINVAL;
    }
    machine_store(m, 0, offsetof(struct guest_header, ballooned), &ballooned, sizeof ballooned);
    machine_store(m, 0, offsetof(struct guest_header, step), &step, sizeof step);
    return 0;
}

int guest_ticks(struct machine *m, uint64_t count)
{
    struct step_result result;
    int rc = 0;

    while (count-- && rc == 0)
        rc = guest_step(m, STEP_TICK, NULL, 0, &result);
    return rc;
}

uint64_t guest_step_number(const struct machine *m)
{
    const struct guest_header *header = guest_header(m);

    return header ? header->step : 0;
}

bool guest_may_balloon(const struct machine *m, uint64_t pfn)
{
    return pfn >= guest_header(m)->reserved_pages;
}

/* ---- the tail of an epoch ---- */

#define REC_TYPE_X86_TSC_INFO 0x08u
#define REC_TYPE_HVM_CONTEXT 0x09u

/* The records' layouts are Xen's (libxc migration stream, X86_TSC_INFO and HVM_CONTEXT); what is inside the
 * HVM context is the hypervisor's own. Little endian, as all we run on. domain.py reads it back. */
struct tail {
    struct { uint32_t type, length; uint32_t mode, khz; uint64_t nsec; uint32_t incarnation, reserved; } tsc;
    struct {
        uint32_t type, length;
        char magic[8];
        uint32_t version, reserved;
        uint64_t step, nr_pfns;
        uint8_t uuid[16];
        char program[PROGRAM_MAX];
    } context;
};

int64_t guest_context(const struct machine *m, uint8_t *buffer, uint64_t capacity)
{
    const struct guest_header *header = guest_header(m);
    struct tail tail = {
        .tsc = { .type = REC_TYPE_X86_TSC_INFO, .length = sizeof tail.tsc - 8 },
        .context = {
            .type = REC_TYPE_HVM_CONTEXT, .length = sizeof tail.context - 8, .magic = "CKEMBCTX",
            .version = 1, .step = header->step, .nr_pfns = header->nr_pfns,
        },
    };

    if (capacity < sizeof tail)
        return -ENOSPC;
    memcpy(tail.context.uuid, header->uuid, sizeof header->uuid);
    memcpy(tail.context.program, header->program, sizeof header->program);
    memcpy(buffer, &tail, sizeof tail);
    return sizeof tail;
}
