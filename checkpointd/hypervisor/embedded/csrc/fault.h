/*
 * Fault injection in C: what checkpointd/faults.py is for Python. Rules are parsed there and handed over;
 * with none, a point costs one comparison. Each point is passed by one thread only, so a rule needs no lock.
 */
#ifndef EMBEDDED_FAULT_H
#define EMBEDDED_FAULT_H

#include <stdint.h>

/* The engine's points are the functions of struct ck_hypervisor, in its order; then come the host's. */
enum fault_point {
    FAULT_SUSPEND, FAULT_RESUME, FAULT_HARVEST, FAULT_P2M_CHANGES, FAULT_TYPES, FAULT_MAP, FAULT_UNMAP,
    FAULT_CONTEXT, FAULT_OUTPUT_CLOSE,
    FAULT_HOST_STEP, FAULT_HOST_INPUT_LOGGED, FAULT_HOST_SUSPENDED, FAULT_HOST_RELEASE,
};

enum fault_action { FAULT_KILL = 1, FAULT_STOP, FAULT_FAIL };

#define FAULT_ACTIONS 4     /* of one rule */
#define FAULT_RULES 32      /* of one process */

struct fault_rule {
    uint32_t point;         /* enum fault_point */
    uint32_t at;            /* acts at this passage, counted from 1 */
    uint32_t again;         /* and at every later one */
    uint32_t passed;
    uint32_t nr_actions;
    uint32_t action[FAULT_ACTIONS];
    int32_t pid[FAULT_ACTIONS];     /* whom to kill or stop */
};

struct fault_rules {
    uint32_t nr;
    struct fault_rule rule[FAULT_RULES];
};

/* -ENOSPC: there are FAULT_RULES of them. */
int fault_add(struct fault_rules *rules, const struct fault_rule *rule);

/* Pass a point: 0, or -EIO if a rule says `fail`. */
int fault_pass(struct fault_rules *rules, enum fault_point point);

#endif
