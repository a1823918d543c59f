#include "xen.h"

#include <string.h>

struct guest guest;
struct registers fake_registers;
void (*fake_meanwhile)(enum call call);
pthread_mutex_t fake_lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

void fake_reset(uint64_t nr_pfns, uint64_t nr_frames)
{
    LOCKED;
    guest = (struct guest){ .nr_pfns = nr_pfns, .free_ports = 1000, .prompt = UINT32_MAX };
    fake_memory_reset(nr_frames);
    fake_ioreq_reset();
    fake_store_reset();
}

void fake_stop(uint32_t reason)
{
    LOCKED;
    guest.flags |= XEN_STATE_SHUTDOWN | reason << 16;
    fake_put("@releaseDomain", "");
}

void fake_react(void)
{
    if (strcmp(fake_get(SHUTDOWN_NODE), "suspend") != 0 || guest.manner == IGNORES)
        return;
    if (guest.manner != STOPS_UNANSWERED) {
        if (guest.interposed[0])
            fake_put(SHUTDOWN_NODE, guest.interposed);
        guest.interposed[0] = '\0';
        fake_put(SHUTDOWN_NODE, "");
    }
    if (guest.manner != ANSWERS_ONLY)
        fake_stop(XEN_SHUTDOWN_SUSPEND);
}
