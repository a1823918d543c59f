#include "strict.h"
#include "aside.h"

#include <errno.h>
#include <signal.h>

int xen_start_thread(pthread_t *thread, const char *name, void *(*run)(void *), void *argument)
{
    sigset_t all, before;
    int rc;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0)
        pthread_setname_np(*thread, name);
    return -rc;
}

static void wait_for(sem_t *semaphore)
{
    while (sem_wait(semaphore) < 0 && errno == EINTR)
        ;
}

static void *run(void *argument)
{
    struct xen_aside *aside = argument;

    for (;;) {
        wait_for(&aside->go);
        if (aside->stop)
            return NULL;
        aside->work(aside->context);
        sem_post(&aside->done);
    }
}

int xen_aside_start(struct xen_aside *aside, const char *name, void (*work)(void *), void *context)
{
    int rc;

    *aside = (struct xen_aside){ .work = work, .context = context };
    sem_init(&aside->go, 0, 0);
    sem_init(&aside->done, 0, 0);
    rc = xen_start_thread(&aside->thread, name, run, aside);
    aside->running = rc == 0;
    return rc;
}

void xen_aside_begin(struct xen_aside *aside)
{
    if (aside->begun)
        return;
    aside->begun = true;
    sem_post(&aside->go);
}

bool xen_aside_end(struct xen_aside *aside)
{
    if (!aside->begun)
        return false;
    wait_for(&aside->done);
    aside->begun = false;
    return true;
}

void xen_aside_stop(struct xen_aside *aside)
{
    if (!aside->running)
        return;
    xen_aside_end(aside);
    aside->stop = true;
    sem_post(&aside->go);
    pthread_join(aside->thread, NULL);
    aside->running = false;
}
