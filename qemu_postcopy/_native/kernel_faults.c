#define _GNU_SOURCE
#include "kernel_faults.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LIMIT_MS 1000
#define LOOK_NS 200000L /* between two looks at the child */

/* In the child, where only async-signal-safe calls may be made: the exit status is an errno. */
static void touch(pid_t parent, pid_t pid, uint64_t address)
{
    char byte;
    struct iovec local = { &byte, 1 }, remote = { (void *)(uintptr_t)address, 1 };

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(ESRCH);
    _exit(process_vm_readv(pid, &local, 1, &remote, 1, 0) == 1 ? 0 : errno);
}

/* Whether it sleeps so that only its end ends that, as whoever waits for a page does in the kernel. */
static int is_in_deep_sleep(pid_t pid)
{
    char path[32], text[512], *name_end;
    ssize_t length;
    int file;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    length = read(file, text, sizeof(text) - 1);
    close(file);
    if (length <= 0)
        return 0;
    text[length] = '\0';
    name_end = strrchr(text, ')'); /* proc(5): the state follows the name */
    return name_end && name_end[1] == ' ' && name_end[2] == 'D';
}

int qpc_kernel_faults_probe(int uffd, int pid, uint64_t address, struct qpc_error *err)
{
    const struct timespec pause = { .tv_nsec = LOOK_NS };
    pid_t parent = getpid(), child = fork();
    struct timespec begin, now;
    int status = 0, ended = 0, told = 0;

    if (child < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "fork");
    if (child == 0)
        touch(parent, pid, address);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (;;) {
        struct pollfd message = { .fd = uffd, .events = POLLIN };

        ended = waitpid(child, &status, WNOHANG) == child;
        if (ended)
            break;
        /* Others may fault meanwhile: only both together say that it is the child that waits. */
        told = poll(&message, 1, 0) == 1 && message.revents & POLLIN && is_in_deep_sleep(child);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (told || (now.tv_sec - begin.tv_sec) * 1000 + (now.tv_nsec - begin.tv_nsec) / 1000000 >=
                        LIMIT_MS)
            break;
        nanosleep(&pause, NULL);
    }
    if (!ended) {
        kill(child, SIGKILL);
        while (waitpid(child, &status, 0) < 0 && errno == EINTR)
            ;
        if (told)
            return QPC_KERNEL_FAULTS_TOLD;
        return qpc_error_set(err, QPC_TIMEOUT, 0, "a read of process %d has not ended in %d ms", pid,
                             LIMIT_MS);
    }
    if (!WIFEXITED(status))
        return qpc_error_set(err, QPC_SYSTEM, 0, "the reader of process %d was killed", pid);
    switch (WEXITSTATUS(status)) {
    case 0:
        return QPC_KERNEL_FAULTS_UNKNOWN;
    case EFAULT:
        return QPC_KERNEL_FAULTS_FAIL;
    case ESRCH:
        return qpc_error_set(err, QPC_GONE, ESRCH, "process %d has ended", pid);
    default:
        return qpc_error_set(err, QPC_REFUSED, WEXITSTATUS(status), "process_vm_readv");
    }
}
