/* See host.h. */
#include "../../../csrc/strict.h"
#include "host.h"

#include "inputlog.h"

#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define NANOSECONDS 1000000000ll
/* A program that runs by itself is woken this often at most, and then does all steps that are due. */
#define TICK_NS 1000000ll           /* 1 ms: fine against an epoch, coarse against a wake-up */
/* After a stop the guest does not make up for what it missed beyond this. */
#define CATCH_UP_NS 50000000ll      /* 50 ms: hides scheduling, does not turn a pause into a burst */

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * NANOSECONDS + t.tv_nsec;
}

/* ---- building ---- */

static struct control *control_new(uint64_t nr_pfns, int *fd)
{
    pthread_mutexattr_t attr;
    uint64_t bytes = control_bytes(nr_pfns);

    *fd = memfd_create("checkpointd-control", MFD_CLOEXEC);
    if (*fd < 0 || ftruncate(*fd, (off_t)bytes) != 0)
        return NULL;
    struct control *c = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
    if (c == MAP_FAILED)
        return NULL;
    c->abi = CONTROL_ABI;
    c->nr_pfns = nr_pfns;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&c->log_lock, &attr);
    pthread_mutexattr_destroy(&attr);
    return c;
}

struct host *host_new(int memory_fd, uint64_t nr_pfns, const uint64_t *populated, uint64_t seed,
                      int udp_fd, int input_log_fd, uint64_t output_limit_bytes)
{
    struct host *h = calloc(1, sizeof *h);

    if (!h)
        return NULL;
    h->mapper.socket = h->nic.wake = h->control_fd = -1;
    h->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    h->note = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    h->done = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&h->order_lock, NULL);
    h->control = control_new(nr_pfns, &h->control_fd);
    h->machine = h->control ? machine_new(memory_fd, nr_pfns, populated, seed) : NULL;
    if (!h->machine || h->kick < 0 || h->note < 0 || h->done < 0
        || nic_init(&h->nic, udp_fd, output_limit_bytes, h->control, &h->faults) != 0) {
        int error = errno;
        /* A host that cannot be built is the end of its process (host.py), which frees the rest. */
        free(h);
        errno = error;
        return NULL;
    }
    machine_share(h->machine, h->control);
    h->input_log = input_log_fd;
    return h;
}

int host_boot(struct host *h, const char *program, const uint8_t uuid[16])
{
    log_lock(h->control);
    int rc = guest_boot(h->machine, program, uuid);
    log_unlock(h->control);
    return rc;
}

uint64_t host_step(const struct host *h)
{
    return guest_step_number(h->machine);
}

/* ---- the guest thread ---- */

/* The guest is no more. `ended` is stored before anyone is told, so whoever is told finds it. */
static void finish(struct host *h, uint32_t reason)
{
    STORE(h->control->ended, reason);
    event_signal(h->note);
    event_signal(h->done);
}

/* One step, logged first if it has input. Returns false once the guest has ended. */
static bool run_step(struct host *h, enum step_kind kind, const struct sockaddr_storage *from,
                     socklen_t from_bytes, const void *input, uint32_t bytes, uint32_t *changed)
{
    struct step_result result;
    int rc = 0;

    fault_pass(&h->faults, FAULT_HOST_STEP);
    if (kind != STEP_TICK) {
        rc = inputlog_append(h->input_log, guest_step_number(h->machine) + 1, (uint16_t)kind, from,
                             input, bytes);
        fault_pass(&h->faults, FAULT_HOST_INPUT_LOGGED);
    }
    if (rc == 0) {
        log_lock(h->control);
        rc = guest_step(h->machine, kind, input, bytes, &result);
        log_unlock(h->control);
    }
    if (rc != 0) {
        /* An input that is not in the log must not be run. No end of the guest's own: its host fails, loudly. */
        h->failure = rc;
        event_signal(h->done);
        return false;
    }
    if (changed)
        *changed = result.changed;
    if (result.reply_bytes)
        nic_send(&h->nic, from, from_bytes, result.reply, result.reply_bytes);
    STORE(h->control->step, guest_step_number(h->machine));     /* its output is queued by then */
    if (result.end)
        finish(h, result.end);
    return result.end == END_NONE;
}

static bool stop_wanted(struct host *h)
{
    struct control *c = h->control;

    return LOAD(h->stop) || LOAD(c->request) || LOAD(c->paused);
}

static void wait_for_kick(struct host *h)
{
    struct pollfd kick = { .fd = h->kick, .events = POLLIN };

    poll(&kick, 1, -1);
    event_drain(h->kick);
}

/* Stand still as long as the engine or the operator wants it. The context is written before `state`, since the
 * engine reads it as soon as it sees its ticket there. */
static void stand_still(struct host *h)
{
    struct control *c = h->control;

    c->context_bytes = (uint32_t)guest_context(h->machine, c->context, sizeof c->context);
    while (stop_wanted(h) && !LOAD(h->stop)) {
        uint32_t ticket = LOAD(c->request);

        if (ticket != LOAD(c->state)) {
            STORE(c->state, ticket);
            if (ticket) {
                event_signal(h->note);
                fault_pass(&h->faults, FAULT_HOST_SUSPENDED);
            }
        }
        wait_for_kick(h);
    }
    STORE(c->state, 0);
}

static bool serve_datagram(struct host *h)
{
    uint8_t data[DATAGRAM_MAX];
    struct sockaddr_storage from;
    socklen_t from_bytes = sizeof from;
    ssize_t n = recvfrom(h->nic.udp, data, sizeof data, MSG_DONTWAIT, (struct sockaddr *)&from, &from_bytes);

    if (n < 0)
        return true;    /* nothing there after all, or the news that an answer was not wanted */
    return run_step(h, STEP_DATAGRAM, &from, from_bytes, data, (uint32_t)n, NULL);
}

/* What of an order can be done is decided before it is logged: it depends on which frames the engine has
 * mapped, which replay does not know. Frames only become free meanwhile, never fewer. */
static uint32_t plan_balloon(struct host *h, bool in, uint32_t *pfns, uint32_t nr)
{
    uint64_t budget = in ? machine_free_frames(h->machine) : nr;
    uint32_t kept = 0;

    for (uint32_t i = 0; i < nr && kept < budget; i++) {
        bool there = machine_page(h->machine, pfns[i]) != NULL;

        if (pfns[i] < h->machine->nr_pfns && there != in && guest_may_balloon(h->machine, pfns[i]))
            pfns[kept++] = pfns[i];
    }
    return kept;
}

static bool serve_order(struct host *h)
{
    uint32_t kind = LOAD(h->order_kind);

    if (kind == 0)
        return true;
    uint32_t nr = plan_balloon(h, kind == STEP_BALLOON_IN, h->order_pfns, h->order_pages);
    uint32_t changed = 0;
    bool alive = run_step(h, kind, NULL, 0, h->order_pfns, nr * 4, &changed);
    pthread_mutex_lock(&h->order_lock);
    h->order_changed = changed;
    STORE(h->order_kind, 0);
    pthread_mutex_unlock(&h->order_lock);
    event_signal(h->done);
    return alive;
}

/* Steps of its own that are due. `*due_ns` is the moment of the next one. */
static bool serve_ticks(struct host *h, int64_t *due_ns)
{
    int64_t now = now_ns();

    if (*due_ns < now - CATCH_UP_NS)
        *due_ns = now - CATCH_UP_NS;
    while (*due_ns <= now && !stop_wanted(h)) {
        if (!run_step(h, STEP_TICK, NULL, 0, NULL, 0, NULL))
            return false;
        *due_ns += NANOSECONDS / (int64_t)h->ticks_per_second;
    }
    return true;
}

static void *run_guest(void *argument)
{
    struct host *h = argument;
    struct pollfd fds[] = { { .fd = h->kick, .events = POLLIN }, { .fd = h->nic.udp, .events = POLLIN } };
    int64_t due = now_ns();
    bool alive = true;

    while (alive && !LOAD(h->stop)) {
        struct timespec wait = { 0, TICK_NS };

        if (stop_wanted(h)) {
            stand_still(h);
            continue;
        }
        alive = serve_order(h);
        if (alive && h->ticks_per_second)
            alive = serve_ticks(h, &due);
        if (!alive || stop_wanted(h))
            continue;
        if (h->ticks_per_second && due - now_ns() > TICK_NS) {
            int64_t until = due - now_ns();
            wait.tv_sec = until / NANOSECONDS;
            wait.tv_nsec = until % NANOSECONDS;
        }
        if (ppoll(fds, 2, h->ticks_per_second ? &wait : NULL, NULL) <= 0)
            continue;
        if (fds[0].revents)
            event_drain(h->kick);
        if (fds[1].revents && !stop_wanted(h))
            alive = serve_datagram(h);
    }
    if (alive)
        finish(h, LOAD(h->stop));
    return NULL;
}

/* ---- orders ---- */

int host_add_fault(struct host *h, const struct fault_rule *rule)
{
    return fault_add(&h->faults, rule);
}

int host_start(struct host *h, bool paused)
{
    const struct guest_header *header = guest_header(h->machine);
    struct program program;
    sigset_t all, before;

    if (!header || !program_parse(header->program, &program))
        return -EINVAL;
    h->ticks_per_second = program.pages * program.rate;
    if (h->ticks_per_second > NANOSECONDS)
        return -EINVAL;
    STORE(h->control->paused, paused);
    STORE(h->control->step, header->step);
    /* Signals are the main thread's business. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = nic_start(&h->nic);
    if (rc == 0)
        rc = -pthread_create(&h->thread, NULL, run_guest, h);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    h->running = rc == 0;
    return rc;
}

void host_end(struct host *h, uint32_t reason)
{
    STORE(h->stop, reason);
    event_signal(h->kick);
    if (h->running)
        pthread_join(h->thread, NULL);
    h->running = false;
}

void host_free(struct host *h)
{
    if (h->running)
        host_end(h, END_DESTROYED);
    host_detach(h);
    nic_stop(&h->nic);
    machine_free(h->machine);
    munmap(h->control, control_bytes(h->control->nr_pfns));
    close(h->control_fd);
    close(h->kick);
    close(h->note);
    close(h->done);
    close(h->input_log);
    free(h->order_pfns);
    pthread_mutex_destroy(&h->order_lock);
    free(h);
}

void host_pause(struct host *h, bool paused)
{
    STORE(h->control->paused, paused);
    event_signal(h->kick);
}

int host_balloon(struct host *h, bool in, const uint32_t *pfns, uint32_t nr)
{
    if (LOAD(h->order_kind))
        return -EBUSY;
    uint32_t *copy = malloc(nr ? nr * sizeof *copy : 1);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, pfns, nr * sizeof *copy);
    pthread_mutex_lock(&h->order_lock);
    free(h->order_pfns);
    h->order_pfns = copy;
    h->order_pages = nr;
    STORE(h->order_kind, in ? STEP_BALLOON_IN : STEP_BALLOON_OUT);
    pthread_mutex_unlock(&h->order_lock);
    event_signal(h->kick);
    return 0;
}

int64_t host_balloon_result(struct host *h)
{
    pthread_mutex_lock(&h->order_lock);
    int64_t result = h->order_kind ? -EAGAIN : (int64_t)h->order_changed;
    pthread_mutex_unlock(&h->order_lock);
    return result;
}

int host_attach(struct host *h, int *fd)
{
    struct control *c = h->control;

    log_lock(c);
    memset(control_changed(c), 0, bitmap_words(c->nr_pfns) * 8);    /* the new engine has nothing mapped */
    log_unlock(c);
    return mapper_start(&h->mapper, h->machine, fd);
}

void host_detach(struct host *h)
{
    struct control *c = h->control;

    mapper_stop(&h->mapper);
    log_lock(c);
    c->log_on = 0;
    log_unlock(c);
    STORE(c->request, 0);
    event_signal(h->kick);
}

int host_enable_log(struct host *h)
{
    struct control *c = h->control;
    int rc = -EINVAL;

    log_lock(c);
    if (!c->log_on) {
        memset(control_dirty(c), 0, bitmap_words(c->nr_pfns) * 8);
        c->log_on = 1;
        rc = 0;
    }
    log_unlock(c);
    return rc;
}

void host_output_open(struct host *h)
{
    nic_open(&h->nic);
}
