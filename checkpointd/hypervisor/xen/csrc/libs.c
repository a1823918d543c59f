#include "strict.h"
#include "libs.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(sizeof(struct xen_dominfo) == 112, "xc_domaininfo_t of Xen 4.17 and 4.20");
_Static_assert(sizeof(struct xen_cpuid_leaf) == 24 && sizeof(struct xen_msr_entry) == 16, "libxc");

/* struct xentoollog_logger (libxentoollog, stable). */
struct xen_logger {
    void (*message)(struct xen_logger *, int level, int error, const char *context,
                    const char *format, va_list arguments);
    void (*progress)(struct xen_logger *, const char *context, const char *doing, int percent,
                     unsigned long done, unsigned long total);
    void (*destroy)(struct xen_logger *);
};

#define LEVEL_WARN 7 /* XTL_WARN: below it the libraries tell stories */

/* By thread: an error is told on the thread that made the call, and nobody waits for a lock in the
 * pause. */
static _Thread_local char said[256];
static _Thread_local char asked[256];

static void keep_message(struct xen_logger *logger, int level, int error, const char *context,
                         const char *format, va_list arguments)
{
    (void)logger, (void)error, (void)context;
    if (level >= LEVEL_WARN)
        vsnprintf(said, sizeof said, format, arguments);
}

static void ignore_destroy(struct xen_logger *logger)
{
    (void)logger;
}

static struct xen_logger logger = { keep_message, NULL, ignore_destroy };

const char *xen_libs_said(void)
{
    memcpy(asked, said, sizeof asked);
    said[0] = '\0';
    return asked;
}

/* ------------------------------------------------------------ opening */

static void library_name(enum xen_library library, uint32_t major, uint32_t minor, char *name,
                         size_t size)
{
    switch (library) {
    case XEN_LIBRARY_CTRL:
        snprintf(name, size, "libxenctrl.so.%u.%u", major, minor);
        break;
    case XEN_LIBRARY_GUEST:
        snprintf(name, size, "libxenguest.so.%u.%u", major, minor);
        break;
    case XEN_LIBRARY_MEMORY:
        snprintf(name, size, "libxenforeignmemory.so.1");
        break;
    case XEN_LIBRARY_EVENTS:
        snprintf(name, size, "libxenevtchn.so.1");
        break;
    case XEN_LIBRARY_DEVICES:
        snprintf(name, size, "libxendevicemodel.so.1");
        break;
    case XEN_LIBRARY_STORE:
    case XEN_LIBRARIES:
        snprintf(name, size, "libxenstore.so.4");
        break;
    }
}

static bool open_library(struct xen_libs *libs, enum xen_library library, const char *directory,
                         const char *name, char *error, size_t size)
{
    char path[512];
    const char *why;

    snprintf(path, sizeof path, "%s%s%s", directory, *directory ? "/" : "", name);
    libs->opened[library] = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (libs->opened[library])
        return true;
    why = dlerror();
    snprintf(error, size, "%s", why ? why : name);
    return false;
}

static bool find(void *library, const char *name, void *pointer, const char *file, char *error,
                 size_t size)
{
    void *symbol = dlsym(library, name);

    if (!symbol) {
        snprintf(error, size, "%s has no function %s", file, name);
        return false;
    }
    memcpy(pointer, &symbol, sizeof symbol); /* ISO C has no cast from object to function pointer */
    return true;
}

static bool open_all(struct xen_libs *libs, uint32_t major, uint32_t minor, const char *directory,
                     char *error, size_t size)
{
    char names[XEN_LIBRARIES][64];

    for (unsigned i = 0; i < XEN_LIBRARIES; i++) {
        library_name((enum xen_library)i, major, minor, names[i], sizeof names[i]);
        if (!open_library(libs, (enum xen_library)i, directory, names[i], error, size))
            return false;
    }
#define FIND(library, result, name, arguments)                                                 \
    if (!find(libs->opened[XEN_LIBRARY_##library], #name, &libs->name,                         \
              names[XEN_LIBRARY_##library], error, size))                                      \
        return false;
    XEN_FUNCTIONS(FIND)
#undef FIND
    return true;
}

static bool open_handles(struct xen_libs *libs, char *error, size_t size)
{
    const char *what = NULL;

    libs->ctrl = libs->xc_interface_open(&logger, &logger, 0);
    if (!libs->ctrl)
        what = "the hypervisor (privcmd)";
    else if (!(libs->memory = libs->xenforeignmemory_open(&logger, 0)))
        what = "foreign memory";
    else if (!(libs->devices = libs->xendevicemodel_open(&logger, 0)))
        what = "device model operations";
    if (what)
        snprintf(error, size, "%s cannot be opened: %s", what, strerror(errno));
    return !what;
}

struct xen_libs *xen_libs_open(uint32_t major, uint32_t minor, const char *directory, char *error,
                               size_t size)
{
    struct xen_libs *libs = calloc(1, sizeof *libs);

    if (!libs) {
        snprintf(error, size, "out of memory");
        return NULL;
    }
    if (open_all(libs, major, minor, directory, error, size) && open_handles(libs, error, size))
        return libs;
    xen_libs_close(libs);
    return NULL;
}

void xen_libs_close(struct xen_libs *libs)
{
    if (!libs)
        return;
    if (libs->devices)
        libs->xendevicemodel_close(libs->devices);
    if (libs->memory)
        libs->xenforeignmemory_close(libs->memory);
    if (libs->ctrl)
        libs->xc_interface_close(libs->ctrl);
    for (unsigned i = XEN_LIBRARIES; i-- > 0;)
        if (libs->opened[i])
            dlclose(libs->opened[i]);
    free(libs);
}

/* ------------------------------------------------------------ facts and orders */

/* What a call of a library that sets errno comes to. */
static int outcome(int rc)
{
    if (rc >= 0)
        return 0;
    return errno ? -errno : -EIO;
}

int xen_domain_next(struct xen_libs *libs, uint32_t first, struct xen_dominfo *info)
{
    /* Room for what a later release may have added, so that a self-check can refuse it unharmed. */
    union { struct xen_dominfo info; uint8_t room[1024]; } answer;
    int n;

    memset(&answer, 0, sizeof answer);
    n = libs->xc_domain_getinfolist(libs->ctrl, first, 1, &answer);
    if (n < 0)
        return outcome(n);
    if (n == 0)
        return -ESRCH;
    *info = answer.info;
    return 0;
}

int xen_domain_state(struct xen_libs *libs, uint32_t domid, struct xen_dominfo *info)
{
    int rc = xen_domain_next(libs, domid, info);

    return rc == 0 && info->domain != domid ? -ESRCH : rc;
}

int xen_pause(struct xen_libs *libs, uint32_t domid)
{
    return outcome(libs->xc_domain_pause(libs->ctrl, domid));
}

int xen_unpause(struct xen_libs *libs, uint32_t domid)
{
    return outcome(libs->xc_domain_unpause(libs->ctrl, domid));
}

int xen_destroy(struct xen_libs *libs, uint32_t domid)
{
    return outcome(libs->xc_domain_destroy(libs->ctrl, domid));
}

int xen_log_enable(struct xen_libs *libs, uint32_t domid)
{
    return outcome(libs->xc_shadow_control(libs->ctrl, domid, XEN_LOG_ENABLE, NULL, 0));
}

int xen_log_off(struct xen_libs *libs, uint32_t domid)
{
    return outcome(libs->xc_shadow_control(libs->ctrl, domid, XEN_LOG_OFF, NULL, 0));
}

int xen_resume(struct xen_libs *libs, struct xen_store *store, uint32_t domid)
{
    int rc = outcome(libs->xc_domain_resume(libs->ctrl, domid, 1));

    if (rc)
        return rc;
    /* Else xenstored takes the domain for shut down, and tells nobody of its next suspend. */
    return libs->xs_resume_domain(store, domid) ? 0 : -errno;
}

int xen_nr_pfns(struct xen_libs *libs, uint32_t domid, uint64_t *nr_pfns)
{
    unsigned long nr = 0;
    int rc = outcome(libs->xc_domain_nr_gpfns(libs->ctrl, domid, &nr));

    *nr_pfns = nr;
    return rc;
}

int xen_take_pages(struct xen_libs *libs, uint32_t domid, unsigned long *pfns, unsigned long count)
{
    return outcome(libs->xc_domain_decrease_reservation_exact(libs->ctrl, domid, count, 0, pfns));
}
