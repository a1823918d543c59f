/*
 * The one guest of the fake Xen, for tests: facts to look at and to change, and what the guest or somebody else does.
 *
 * Read by the C compiler (through xen.h) and, as it stands, by cffi (fake_xen.py), so that both see the same struct: no
 * directives but numbers.
 */
#define DOMID 4
#define VCPUS 2
#define MAX_PFNS 4096

/* What the guest does when it is asked to suspend; the last: it stops for an earlier request, which it has answered. */
enum manner { STOPS, ANSWERS_ONLY, IGNORES, STOPS_UNANSWERED };
/* Calls of an engine in a live round. */
enum call { TYPES, MAP, CALLS };

struct guest {
    uint32_t flags; /* XEN_STATE_*, the shutdown reason in bits 16-23 */
    bool gone;
    uint64_t nr_pfns, tot_pages;

    /* suspend */
    int manner;          /* enum manner */
    char interposed[32]; /* somebody else writes it to control/shutdown, just before the guest answers */
    uint64_t resumes;

    /* memory */
    int fail_map;    /* errno of the next mapping */
    uint64_t mapped; /* mappings that there are */
    uint64_t pfns_asked, calls[CALLS];

    /* dirty log */
    bool log_on;
    bool marks; /* a page that comes in is marked dirty (Xen from 4.19.5 and 4.20.3 on) */
    uint64_t log[MAX_PFNS / 64], logs_ended;
    int fail_log;        /* errno of the next harvest */
    int fail_mark;       /* errno of marking a page */
    long long short_log; /* what the next harvest says instead of the number of pages */

    /* xenstore */
    unsigned prompt; /* so many more watch events come at once, the others with the next answer */
    bool broken_in;  /* somebody comes in between: the next transaction fails */
    uint64_t waited; /* reads that the test's own thread waited for, outside of a transaction */
    uint64_t told;   /* times that xenstored was told of a resume */

    /* ioreq server */
    bool server, enabled;
    bool ask_at_enable; /* every vcpu, as soon as it can */
    bool mute;          /* events are lost: the holder of the ports is as good as dead */
    int free_ports;     /* of dom0 */
    int fail_destroy;   /* errno of destroying it */
};
extern struct guest guest;

/* A new guest, with memory behind the first half of `nr_frames` pfns. Connections to xenstore stay open. */
void fake_reset(uint64_t nr_pfns, uint64_t nr_frames);

/* It shuts down for `reason`, and xenstored tells of it. */
void fake_stop(uint32_t reason);

/* Somebody else writes a node of xenstore, or a special watch fires (@releaseDomain). */
void fake_put(const char *path, const char *value);
/* Somebody else removes a node and all below it. */
void fake_drop(const char *path);
/* "": there is none. */
const char *fake_get(const char *path);

/* What a page holds: its first 8 octets; -1: nothing is there. */
int64_t fake_value(uint64_t pfn);
void fake_write(uint64_t pfn, int64_t value);
/* A page leaves, and nobody is asked. */
void fake_take(uint64_t pfn);
/* A page comes in, holding `value`; false: there is one, or no frame is left. */
bool fake_give(uint64_t pfn, int64_t value);

/* The guest writes to a page, whatever it is. */
void fake_dirty(uint64_t pfn);
/* Somebody else cleans the log. */
void fake_clean(void);

/* A vcpu asks the ioreq server, and does not wait yet. */
void fake_ask(int vcpu);
/* Does it still wait for the answer? */
bool fake_waits(int vcpu);
/* The holder of the ports dies. */
void fake_unbind(void);
