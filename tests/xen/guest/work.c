/*
 * The load of a lab's guest. It changes pages at random, checks its own memory without pause, and says once a
 * second on the console what it found:
 *
 *   tick 17 uptime 23.41 checked OK ops 5003 stalls 3 stall_ms 12.5 longest_ms 8.1 mem_kb 131072 churn 0 echo 0 disk 0
 *
 * Words of the kernel line:
 *   pages=N       working set, split among one worker for each vcpu (default 1024)
 *   rate=N        changes a second, of all workers together (default 1000); 0 sleeps, and only checks
 *   spin=1        workers do not sleep between changes, and see every stall of more than 2 ms, at 100 % of each vcpu;
 *                 without it those are seen that are longer than that and one sleep (5 ms, idle 100 ms) together
 *   pressure=MIB  memory that is taken, filled, checked and given back without pause, as far as there is any
 *   echo=PORT     answers UDP datagrams with "tick N " and what they held
 *   disk=NAME     reads random blocks of /dev/NAME, which `work make-disk` made, and checks them
 *
 * A page: word 0 says which page it is, word 1 counts its changes, word 2 is the sum of all behind it. A torn page
 * fails its sum, a foreign or lost page its name, and a whole page of another moment its count, which is kept a
 * second time elsewhere. Whatever is wrong once is reported as a CORRUPT line, and in every tick from then on.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    WORDS = 512,               /* of 8 octets, in a page */
    MAX_WORKERS = 8,
    CHURN_BLOCK = 256,         /* pages taken at a time under pressure */
    CHURN_MARGIN_KB = 8 << 10, /* left free under pressure, or the kernel would begin to kill */
};
#define SECOND 1000000000ull  /* ns */
#define STALL 2000000ull      /* ns; shorter ones are the emulation's own */
#define STEP 1000000ull       /* ns between two looks at the clock, while there is something to do */
#define IDLE_STEP 100000000ull
#define SWEEP_AT_ONCE 16      /* pages checked between two looks at the clock, at least */

struct worker {
    pthread_t thread;
    unsigned number;
    size_t pages;
    double rate; /* changes a second */
    uint64_t *memory, *counts;
    uint64_t random;
    uint64_t last; /* look at the clock */
    _Atomic uint64_t changes, sweeps;
    _Atomic uint64_t stalls, stalled, longest; /* count; ns; ns */
};

static struct worker workers[MAX_WORKERS];
static unsigned nr_workers;
static bool spin;
static atomic_bool corrupt;
static _Atomic uint64_t ticks, churned, echoed, blocks_read;

static uint64_t now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t when) {
    struct timespec t = {.tv_sec = (time_t)(when / SECOND), .tv_nsec = (long)(when % SECOND)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {
    }
}

__attribute__((format(printf, 1, 2))) static void report_corrupt(const char *format, ...) {
    va_list arguments;
    atomic_store(&corrupt, true);
    flockfile(stdout);
    printf("CORRUPT ");
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    fflush(stdout);
    funlockfile(stdout);
}

static uint64_t mix(uint64_t x) { /* a bijection without a pattern (splitmix64) */
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static uint64_t next_random(uint64_t *state) { return mix((*state)++); }

static void *take(size_t octets) {
    void *memory = mmap(NULL, octets, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("work: mmap");
        exit(1);
    }
    return memory;
}

static uint64_t sum(const uint64_t *page) {
    uint64_t total = 0;
    for (size_t i = 3; i < WORDS; i++)
        total += page[i];
    return total;
}

static uint64_t name_of(const struct worker *w, size_t p) { return mix((uint64_t)w->number << 32 | p); }

static void check_page(const struct worker *w, size_t p, bool whole) {
    const uint64_t *page = w->memory + p * WORDS;
    __asm__ volatile("" ::: "memory"); /* what is there now, not what the compiler remembers */
    if (page[0] != name_of(w, p))
        report_corrupt("worker %u page %zu: is named %016llx, not %016llx", w->number, p,
                       (unsigned long long)page[0], (unsigned long long)name_of(w, p));
    else if (page[1] != w->counts[p])
        report_corrupt("worker %u page %zu: changed %llu times, not %llu", w->number, p,
                       (unsigned long long)page[1], (unsigned long long)w->counts[p]);
    else if (whole && page[2] != sum(page))
        report_corrupt("worker %u page %zu: its words sum up to %016llx, not %016llx", w->number, p,
                       (unsigned long long)sum(page), (unsigned long long)page[2]);
}

static void change_page(struct worker *w, size_t p, uint64_t value) {
    uint64_t *page = w->memory + p * WORDS;
    uint64_t *word = page + 3 + (value >> 40) % (WORDS - 3);
    check_page(w, p, false);
    page[2] += value - *word;
    *word = value;
    page[1] = ++w->counts[p];
}

static void note_stall(struct worker *w, uint64_t length) {
    atomic_fetch_add(&w->stalls, 1);
    atomic_fetch_add(&w->stalled, length);
    if (length > atomic_load(&w->longest))
        atomic_store(&w->longest, length);
}

/* Looks at the clock; gives the time since the last look, of which the worker slept `asleep` by its own will. */
static uint64_t look(struct worker *w, uint64_t *t, uint64_t asleep) {
    uint64_t gap = (*t = now(CLOCK_MONOTONIC)) - w->last;
    if (gap > STALL + 2 * asleep)
        note_stall(w, gap - asleep);
    w->last = *t;
    return gap;
}

static void *work(void *argument) {
    struct worker *w = argument;
    uint64_t step = w->rate > 0 ? STEP : IDLE_STEP;
    size_t swept = 0;
    uint64_t t = now(CLOCK_MONOTONIC), sweep_at = t, wake = t, busy = 0;
    double due = 0; /* changes that are owed */
    w->last = t;
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        /* A stop that falls into a sleep begins, on average, half a step after the last look. */
        uint64_t gap = look(w, &t, spin ? 0 : step / 2) + busy;
        due += w->rate * (double)gap / SECOND;
        if (due > w->rate / 2)
            due = w->rate / 2; /* what a stall of more than half a second kept from being done is lost */
        busy = 0;
        for (; due >= 1; due--) {
            uint64_t value = next_random(&w->random);
            change_page(w, value % w->pages, value);
            atomic_fetch_add_explicit(&w->changes, 1, memory_order_relaxed);
            /* Each costs a fault where the memory's changes are logged: what many of them take is no stall. */
            if (spin)
                busy += look(w, &t, 0);
        }
        if (t >= sweep_at) {
            /* Half a second for a sweep where workers sleep, also if they are woken late; a quarter of it in one go. */
            size_t at_once = SWEEP_AT_ONCE + (spin ? 0 : 2 * w->pages * gap / SECOND);
            if (at_once > w->pages / 4 + SWEEP_AT_ONCE)
                at_once = w->pages / 4 + SWEEP_AT_ONCE;
            for (size_t n = 0; n < at_once && swept < w->pages; n++) {
                check_page(w, swept++, true);
                if (spin)
                    busy += look(w, &t, 0);
            }
            if (swept == w->pages) {
                swept = 0;
                sweep_at = t + SECOND;
                atomic_fetch_add(&w->sweeps, 1);
            }
        }
        if (!spin) {
            wake += step;
            if (wake <= t)
                wake = t + step; /* late: keep no debt of wakes */
            sleep_until(wake);
        }
    }
    return NULL;
}

static unsigned long memory_kb(const char *what) {
    char line[128];
    unsigned long value = 0;
    FILE *file = fopen("/proc/meminfo", "re");
    while (file && fgets(line, sizeof(line), file))
        if (!strncmp(line, what, strlen(what)) && sscanf(line + strlen(what), ": %lu", &value) == 1)
            break;
    if (file)
        fclose(file);
    return value;
}

/* Takes pages, fills and checks them, and gives them back, so that they wander between guest and free list. */
static void *churn(void *argument) {
    size_t nr_blocks = (size_t)argument, octets = (size_t)CHURN_BLOCK * WORDS * 8;
    uint64_t **blocks = calloc(nr_blocks, sizeof(*blocks));
    for (uint64_t round = 0;; round++) {
        size_t taken = 0;
        while (taken < nr_blocks && memory_kb("MemAvailable") > CHURN_MARGIN_KB + octets / 1024) {
            uint64_t *block = blocks[taken] = take(octets);
            for (size_t i = 0; i < octets / 8; i++)
                block[i] = round << 40 | taken << 20 | i / WORDS;
            taken++;
        }
        sleep_until(now(CLOCK_MONOTONIC) + SECOND / 5);
        for (size_t b = 0; b < taken; b++) {
            __asm__ volatile("" ::: "memory");
            for (size_t i = 0; i < octets / 8; i++)
                if (blocks[b][i] != (round << 40 | b << 20 | i / WORDS)) {
                    report_corrupt("pressure round %llu block %zu word %zu: %016llx", (unsigned long long)round, b, i,
                                   (unsigned long long)blocks[b][i]);
                    break;
                }
            munmap(blocks[b], octets);
        }
        atomic_fetch_add(&churned, taken * CHURN_BLOCK);
        sleep_until(now(CLOCK_MONOTONIC) + SECOND / 5);
    }
    return NULL;
}

static void *echo(void *argument) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)(uintptr_t)argument)};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address))) {
        perror("work: echo");
        return NULL;
    }
    for (;;) {
        char request[1024], answer[1100];
        socklen_t size = sizeof(address);
        ssize_t length = recvfrom(fd, request, sizeof(request), 0, (struct sockaddr *)&address, &size);
        if (length < 0)
            continue;
        int head = snprintf(answer, sizeof(answer), "tick %llu ", (unsigned long long)atomic_load(&ticks));
        memcpy(answer + head, request, (size_t)length);
        sendto(fd, answer, (size_t)(head + length), 0, (struct sockaddr *)&address, size);
        atomic_fetch_add(&echoed, 1);
    }
    return NULL;
}

static uint64_t disk_word(size_t block, size_t i) { return mix((uint64_t)block << 16 | i); }

static int make_disk(const char *path, size_t nr_blocks) {
    FILE *file = fopen(path, "we");
    for (size_t block = 0; file && block < nr_blocks; block++) {
        uint64_t words[WORDS];
        for (size_t i = 0; i < WORDS; i++)
            words[i] = disk_word(block, i);
        if (fwrite(words, sizeof(words), 1, file) != 1)
            break;
    }
    if (!file || ferror(file) || fclose(file)) {
        perror(path);
        return 1;
    }
    return 0;
}

static void *read_disk(void *argument) {
    int fd = open(argument, O_RDONLY | O_DIRECT | O_CLOEXEC);
    off_t size = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
    uint64_t *words = take(WORDS * 8), random = 0;
    if (size < WORDS * 8) {
        perror("work: disk");
        return NULL;
    }
    for (;;) {
        size_t block = next_random(&random) % ((size_t)size / (WORDS * 8));
        ssize_t got = pread(fd, words, WORDS * 8, (off_t)(block * WORDS * 8));
        if (got != WORDS * 8)
            report_corrupt("disk block %zu: read gives %zd, errno %d", block, got, errno);
        else
            for (size_t i = 0; i < WORDS; i++)
                if (words[i] != disk_word(block, i)) {
                    report_corrupt("disk block %zu word %zu: %016llx", block, i, (unsigned long long)words[i]);
                    break;
                }
        atomic_fetch_add(&blocks_read, 1);
        sleep_until(now(CLOCK_MONOTONIC) + SECOND / 20);
    }
    return NULL;
}

static void start(void *(*body)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, body, argument)) {
        perror("work: thread");
        exit(1);
    }
}

static void start_workers(size_t pages, double rate) {
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    nr_workers = online > MAX_WORKERS ? MAX_WORKERS : (unsigned)online;
    for (unsigned i = 0; i < nr_workers; i++) {
        struct worker *w = &workers[i];
        w->number = i;
        w->pages = pages / nr_workers + 1;
        w->rate = rate / nr_workers;
        w->random = mix(i);
        w->memory = take(w->pages * WORDS * 8);
        w->counts = take(w->pages * 8);
        for (size_t p = 0; p < w->pages; p++)
            w->memory[p * WORDS] = name_of(w, p);
        start(work, w);
    }
}

static bool all_swept(const uint64_t *before) {
    for (unsigned i = 0; i < nr_workers; i++)
        if (atomic_load(&workers[i].sweeps) <= before[i])
            return false;
    return true;
}

static void tick(void) {
    static uint64_t swept[MAX_WORKERS];
    uint64_t changes = 0;
    struct worker *first = &workers[0]; /* of the stalls, what one vcpu saw: all are stopped together */
    sleep_until(now(CLOCK_MONOTONIC) + SECOND);
    while (!all_swept(swept))
        sleep_until(now(CLOCK_MONOTONIC) + SECOND / 50);
    for (unsigned i = 0; i < nr_workers; i++) {
        swept[i] = atomic_load(&workers[i].sweeps);
        changes += atomic_exchange(&workers[i].changes, 0);
    }
    flockfile(stdout);
    printf("tick %llu uptime %.2f checked %s ops %llu stalls %llu stall_ms %.1f longest_ms %.1f mem_kb %lu churn %llu "
           "echo %llu disk %llu\n",
           (unsigned long long)atomic_fetch_add(&ticks, 1) + 1, (double)now(CLOCK_BOOTTIME) / SECOND,
           atomic_load(&corrupt) ? "CORRUPT" : "OK", (unsigned long long)changes,
           (unsigned long long)atomic_exchange(&first->stalls, 0), (double)atomic_exchange(&first->stalled, 0) / 1e6,
           (double)atomic_exchange(&first->longest, 0) / 1e6, memory_kb("MemTotal"),
           (unsigned long long)atomic_load(&churned), (unsigned long long)atomic_load(&echoed),
           (unsigned long long)atomic_load(&blocks_read));
    fflush(stdout);
    funlockfile(stdout);
}

int main(int argc, char **argv) {
    static char line[4096], disk[64];
    size_t pages = 1024, pressure = 0, port = 0;
    double rate = 1000;
    if (argc == 4 && !strcmp(argv[1], "make-disk"))
        return make_disk(argv[2], (size_t)atol(argv[3]));
    FILE *file = fopen("/proc/cmdline", "re");
    if (!file || !fgets(line, sizeof(line), file))
        return 1;
    fclose(file);
    for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
        long number;
        char name[32];
        if (sscanf(word, "disk=%31s", name) == 1)
            snprintf(disk, sizeof(disk), "/dev/%s", name);
        if (sscanf(word, "%31[a-z]=%ld", name, &number) != 2 || number < 0)
            continue;
        if (!strcmp(name, "pages"))
            pages = (size_t)number;
        else if (!strcmp(name, "rate"))
            rate = (double)number;
        else if (!strcmp(name, "spin"))
            spin = number;
        else if (!strcmp(name, "pressure"))
            pressure = (size_t)number;
        else if (!strcmp(name, "echo"))
            port = (size_t)number;
    }
    file = fopen("/proc/self/oom_score_adj", "we");
    if (file) {
        fprintf(file, "-1000"); /* out of memory the kernel must say so, not end the check */
        fclose(file);
    }
    printf("work: %zu pages, %.0f changes a second, pressure %zu MiB\n", pages, rate, pressure);
    fflush(stdout);
    start_workers(pages, rate);
    if (pressure)
        start(churn, (void *)(pressure * 256 / CHURN_BLOCK));
    if (port)
        start(echo, (void *)port);
    if (*disk)
        start(read_disk, disk);
    for (;;)
        tick();
}
