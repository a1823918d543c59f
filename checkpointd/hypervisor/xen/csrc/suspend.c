/*
 * Stopping the guest and letting it run on.
 *
 * The guest is asked by control/shutdown in xenstore: it answers by emptying that node, brings its drivers to
 * rest and shuts down with reason "suspend", upon which xenstored fires @releaseDomain. (The guest's own
 * suspend event channel, older than this, is left empty by Linux.)
 *
 * The same node is how others suspend, shut down or reboot this guest. Two askers cannot be told apart by the
 * guest, so the writes of the node are counted from our request on: that, and the guest's answer. One more, or
 * none by the guest, and it stopped for somebody else as well (xl save, xl migrate), who believes that it stopped
 * for him and reads its memory: it is not resumed then. What was asked and answered before our request does not
 * count: a guest that is powering off answers, and goes on suspending until it is off.
 *
 * A watch that has fired at xenstored may be on its way to us yet, and the guest's answer to both must not pass for its
 * answer to ours. xenstored answers in order: what was written before it answered a read of ours has been told when that
 * answer comes. So the node is read after the guest has stopped. A round trip takes as long as some other pauses do as a
 * whole, so a thread of its own makes it, while the pause goes on with calls to the hypervisor and with copying; resume()
 * waits for it, and has not to. What is asked after that read is not answered before the guest runs: it is obeyed then.
 */
#include "strict.h"
#include "domain.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RELEASED "released"
#define SHUTDOWN "shutdown"

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Take note of the watches that have fired. */
static void look_at_watches(struct xen_domain *d)
{
    char **fired;

    while ((fired = d->libs->xs_check_watch(d->store)) != NULL) {
        d->writes += strcmp(fired[1], SHUTDOWN) == 0; /* path, token */
        free(fired);
    }
}

/* What control/shutdown says: a word, "" if nothing is asked or the node is missing. 0 or a negative errno. */
static int read_request(struct xen_domain *d, uint32_t transaction, char *word, size_t size)
{
    unsigned length = 0;
    char *value = d->libs->xs_read(d->store, transaction, d->shutdown_path, &length);

    word[0] = '\0';
    if (!value)
        return errno == ENOENT ? 0 : -errno;
    snprintf(word, size, "%.*s", (int)length, value);
    free(value);
    return 0;
}

static void look(void *domain)
{
    struct xen_domain *d = domain;

    d->word_rc = read_request(d, 0, d->word, sizeof d->word);
}

int xen_suspend_prepare(struct xen_domain *d)
{
    snprintf(d->shutdown_path, sizeof d->shutdown_path, "/local/domain/%u/control/shutdown",
             d->domid);
    if (!d->libs->xs_watch(d->store, "@releaseDomain", RELEASED)
        || !d->libs->xs_watch(d->store, d->shutdown_path, SHUTDOWN))
        return -errno;
    return xen_aside_start(&d->look, "control-node", look, d);
}

void xen_suspend_end(struct xen_domain *d)
{
    xen_aside_stop(&d->look);
}

/* Put `to` where `from` stands, unless something else stands there: 1 done, 0 not so, or negative errno.
 * xenstored answers in order, so what was written before is seen by the time it has answered the read; and had anybody
 * written since, the transaction would fail. So on 1, only what comes with and after this write is not seen yet. */
static int exchange(struct xen_domain *d, const char *from, const char *to)
{
    char word[32];

    for (;;) {
        uint32_t transaction = d->libs->xs_transaction_start(d->store);
        int rc;

        if (transaction == 0)
            return -errno;
        rc = read_request(d, transaction, word, sizeof word);
        look_at_watches(d);
        if (rc == 0 && strcmp(word, from) == 0)
            rc = d->libs->xs_write(d->store, transaction, d->shutdown_path, to,
                                   (unsigned)strlen(to)) ? 1 : -errno;
        if (d->libs->xs_transaction_end(d->store, transaction, rc != 1))
            return rc;
        if (errno != EAGAIN)
            return rc < 0 ? rc : -errno;
    }
}

enum { RUNNING, SUSPENDED };

static int look_at_guest(struct xen_domain *d)
{
    struct xen_dominfo info;
    int rc = xen_domain_state(d->libs, d->domid, &info);

    if (rc == -ESRCH || (rc == 0 && xen_is_ended(&info)))
        return -ESHUTDOWN;
    if (rc)
        return rc;
    return xen_is_suspended(&info) ? SUSPENDED : RUNNING;
}

static void keep(struct xen_domain *d, int64_t asked_ns)
{
    __atomic_store_n(d->asked_ns, (uint64_t)asked_ns, __ATOMIC_SEQ_CST);
}

/* Nothing is out any more, unless an earlier request was taken and not obeyed yet. */
static void forget(struct xen_domain *d)
{
    if (!d->late)
        keep(d, 0);
}

void xen_domain_keep(struct xen_domain *d, uint64_t *asked_ns)
{
    d->asked_ns = asked_ns;
    d->late = *asked_ns != 0;
}

/* It does not stop in time: take the request back, or expect it late. -ETIMEDOUT, or another negative errno. */
static int withdraw(struct xen_domain *d)
{
    int rc = exchange(d, "suspend", "");

    if (rc < 0)
        return rc;
    d->late |= rc == 0; /* taken, and not obeyed yet */
    forget(d);
    return -ETIMEDOUT;
}

static int wait_for_suspend(struct xen_domain *d, int64_t deadline)
{
    struct pollfd poll_store = { .fd = d->libs->xs_fileno(d->store), .events = POLLIN };

    for (;;) {
        int state = look_at_guest(d);
        int64_t left = deadline - now_ns();

        if (state != RUNNING)
            return state;
        if (left <= 0)
            return withdraw(d);
        if (poll(&poll_store, 1, (int)(left / 1000000 + 1)) < 0 && errno != EINTR)
            return -errno;
        look_at_watches(d);
    }
}

static int leave_to_others(struct xen_domain *d)
{
    d->foreign = true;
    keep(d, 0);
    return -EBUSY;
}

bool xen_stands_for_others(struct xen_domain *d)
{
    if (!d->foreign && !d->suspended && !d->late && look_at_guest(d) == SUSPENDED)
        leave_to_others(d);
    return d->foreign;
}

int xen_suspend(void *domain, int64_t timeout_ns)
{
    struct xen_domain *d = domain;
    int64_t deadline = now_ns() + timeout_ns;
    int rc = look_at_guest(d);

    if (rc < 0)
        return rc;
    if (d->foreign || (rc == SUSPENDED && !d->suspended && !d->late))
        return leave_to_others(d);
    if (rc == RUNNING) {
        d->suspended = false;
        keep(d, timeout_ns > 0 ? timeout_ns : 1);
        rc = exchange(d, "", "suspend");
        if (rc < 0)
            return rc;
        if (rc == 0) {
            forget(d);
            return -EBUSY; /* somebody asks for something else: the guest answers that first */
        }
        d->writes = 0;
        rc = wait_for_suspend(d, deadline);
        if (rc < 0)
            return rc;
    }
    d->suspended = true;
    xen_aside_begin(&d->look);
    return 0;
}

#define ASKED_AND_ANSWERED 2 /* writes of the node */

/* Has somebody else asked the guest to suspend while it was ours? Then it stands still for him, and is left so. */
static int is_taken(struct xen_domain *d)
{
    char word[32];
    bool looked = xen_aside_end(&d->look) && d->word_rc == 0;
    int rc;

    look_at_watches(d);
    if (looked && d->word[0] == '\0' && d->writes == ASKED_AND_ANSWERED && !d->late)
        return 0;
    rc = read_request(d, 0, word, sizeof word);
    if (rc)
        return rc;
    look_at_watches(d); /* what was written before that answer is seen by now */
    if (strcmp(word, "") == 0) {
        d->foreign = d->writes > ASKED_AND_ANSWERED; /* the guest has answered both at once */
    } else if (strcmp(word, "suspend") == 0) {
        /* Not answered. If it is ours, the guest stopped for whoever asked before: that was we, if it was late. If
         * it is his, he waits for the answer and finds the guest suspended. Nobody is to obey it after a resume. */
        d->foreign = !(d->late && d->writes < ASKED_AND_ANSWERED);
        rc = exchange(d, "suspend", "");
    } /* poweroff, reboot: the guest answers once it runs */
    if (d->foreign)
        keep(d, 0);
    return rc < 0 ? rc : d->foreign;
}

int xen_resume_ours(void *domain)
{
    struct xen_domain *d = domain;
    int rc;

    if (d->foreign)
        return -ESHUTDOWN; /* lost to us: ended() says how */
    if (!d->suspended) {
        if (!d->late)
            return 0;
        rc = look_at_guest(d); /* it may have stopped since its request was given up */
        if (rc != SUSPENDED)
            return rc;
        d->suspended = true;
    }
    rc = is_taken(d);
    if (rc)
        return rc < 0 ? rc : -ESHUTDOWN;
    rc = xen_resume(d->libs, d->store, d->domid);
    if (rc)
        return look_at_guest(d) == -ESHUTDOWN ? -ESHUTDOWN : rc;
    d->suspended = d->late = false;
    keep(d, 0);
    return 0;
}
