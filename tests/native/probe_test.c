/*
 * The probes in C alone: each one answers, twice the same, and leaves no child and no descriptor.
 * Exits 0 where that is so; whether a probe says yes or no is the host's affair.
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <sys/wait.h>

#include "probe.h"

static int open_descriptors(void)
{
    DIR *folder = opendir("/proc/self/fd");
    int count = 0;

    while (folder && readdir(folder))
        count++;
    if (folder)
        closedir(folder);
    return count;
}

static int probe(int number, struct qpc_error *err)
{
    uint64_t features = 0;

    switch (number) {
    case 0:
    case 1:
    case 2:
        return qpc_probe_userfaultfd(number, &features, err);
    case 3:
    case 4:
        return qpc_probe_ptrace(number == 4, err);
    case 5:
        return qpc_probe_pidfd_getfd(err);
    default:
        return qpc_probe_collapse(err);
    }
}

int main(void)
{
    uint64_t features = 0;
    int number, before, failed = 0;

    for (number = 0; number < 7; number++) {
        struct qpc_error first = { 0 }, second = { 0 };
        int first_result = probe(number, &first), second_result;

        before = open_descriptors();
        second_result = probe(number, &second);
        printf("probe %d: %d, errno %d\n", number, first_result, first.errnum);
        if (first_result != second_result || first.errnum != second.errnum) {
            fprintf(stderr, "probe %d answers differently the second time\n", number);
            failed = 1;
        }
        if (first_result < 0 && (first.errnum == 0 || first.message[0] == '\0')) {
            fprintf(stderr, "probe %d refuses without a reason\n", number);
            failed = 1;
        }
        if (open_descriptors() != before) {
            fprintf(stderr, "probe %d leaves a descriptor\n", number);
            failed = 1;
        }
        if (waitpid(-1, NULL, WNOHANG) != -1 || errno != ECHILD) {
            fprintf(stderr, "probe %d leaves a child\n", number);
            failed = 1;
        }
    }
    if (qpc_probe_userfaultfd(3, &features, NULL) != -1) {
        fprintf(stderr, "a way that does not exist is accepted\n");
        failed = 1;
    }
    return failed;
}
