/* See fault.h. */
#include "../../../csrc/strict.h"
#include "fault.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>

static int act(const struct fault_rule *rule)
{
    int rc = 0;

    for (uint32_t i = 0; i < rule->nr_actions; i++) {
        if (rule->action[i] == FAULT_KILL)
            kill(rule->pid[i], SIGKILL);
        else if (rule->action[i] == FAULT_STOP)
            raise(SIGSTOP);     /* by this thread: another one would take it later, with this one past the point */
        else
            rc = -EIO;
    }
    return rc;
}

int fault_pass(struct fault_rules *rules, enum fault_point point)
{
    int rc = 0;

    for (uint32_t i = 0; i < rules->nr; i++) {
        struct fault_rule *rule = &rules->rule[i];

        if (rule->point != (uint32_t)point)
            continue;
        rule->passed++;
        bool due = rule->passed == rule->at || (rule->again && rule->passed > rule->at);
        if (due && act(rule) != 0)
            rc = -EIO;
    }
    return rc;
}

int fault_add(struct fault_rules *rules, const struct fault_rule *rule)
{
    if (rules->nr == FAULT_RULES)
        return -ENOSPC;
    rules->rule[rules->nr++] = *rule;
    return 0;
}
