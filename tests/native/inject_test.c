/*
 * Drives inject.c against a real target: a forked process with threads that compute, sleep, wait
 * in a read, and take queued signals, all of which notice if anything of theirs was changed.
 * Usage: inject_test CASE. Prints what failed and exits 1, or prints the measurements and exits 0.
 * Exit 77: this host lacks what the case needs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "inject.h"
#include "uffd.h"

#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition)) {                                             \
            fprintf(stderr, "line %d: %s: ", __LINE__, #condition);     \
            fprintf(stderr, __VA_ARGS__);                               \
            fprintf(stderr, "\n");                                      \
            if (target > 0)                                             \
                kill(target, SIGKILL);                                  \
            exit(1);                                                    \
        }                                                               \
    } while (0)

enum { COMPUTE, SLEEP, READ, STACK, THREADS };
enum { PAGE = 4096, SIGNALS = 5000 };

struct shared {
    atomic_int tids[THREADS];
    atomic_ulong rounds[THREADS];
    atomic_ulong wrong[THREADS];
    atomic_ulong signals_seen, signals_wrong;
    atomic_int blocked_tid;
    _Atomic(char *) fault_page;
};

static struct shared *shared;
static pid_t target;
static int target_pidfd, to_target[2], from_target[2];
static bool sleeper_is_nobody;

/* ---- the target ---- */

static void on_signal(int number, siginfo_t *info, void *context)
{
    unsigned long seen = atomic_fetch_add(&shared->signals_seen, 1);

    if ((unsigned long)info->si_value.sival_int != seen)
        atomic_fetch_add(&shared->signals_wrong, 1);
}

static void *compute(void *unused)
{
    double expected = 0;

    atomic_store(&shared->tids[COMPUTE], (int)syscall(SYS_gettid));
    for (unsigned long round = 0;; round++) {
        double a[4] = { 1, 2, 3, 4 }, sum = 0;
        uint64_t hash = 14695981039346656037u;

        for (int i = 0; i < 2000; i++)
            for (int k = 0; k < 4; k++) {
                a[k] = a[k] * 1.0000001 + k;
                hash = (hash ^ (uint64_t)(i + k)) * 1099511628211u;
            }
        sum = a[0] + a[1] + a[2] + a[3] + (double)(hash >> 40);
        if (round == 0)
            expected = sum;
        else if (sum != expected)
            atomic_fetch_add(&shared->wrong[COMPUTE], 1);
        atomic_fetch_add(&shared->rounds[COMPUTE], 1);
    }
    return NULL;
}

/* Relative sleeps go on by restart_syscall(2) after a stop: neither EINTR nor an early end. */
static void *sleep_often(void *unused)
{
    /* The system call itself changes this thread alone (setresuid(2)). */
    if (sleeper_is_nobody && syscall(SYS_setresuid, 65534, 65534, 65534) < 0)
        _exit(1);
    atomic_store(&shared->tids[SLEEP], (int)syscall(SYS_gettid));
    for (;;) {
        struct timespec before, after, rest = { .tv_nsec = 3000000 };
        long slept;

        clock_gettime(CLOCK_MONOTONIC, &before);
        if (clock_nanosleep(CLOCK_MONOTONIC, 0, &rest, NULL) != 0)
            atomic_fetch_add(&shared->wrong[SLEEP], 1);
        clock_gettime(CLOCK_MONOTONIC, &after);
        slept = (after.tv_sec - before.tv_sec) * 1000000000L + after.tv_nsec - before.tv_nsec;
        if (slept < 3000000)
            atomic_fetch_add(&shared->wrong[SLEEP], 1);
        atomic_fetch_add(&shared->rounds[SLEEP], 1);
    }
    return NULL;
}

/* Raw read(2): it must never show EINTR, since no handler runs in this thread. */
static void *read_commands(void *unused)
{
    char command;

    atomic_store(&shared->tids[READ], (int)syscall(SYS_gettid));
    for (;;) {
        if (syscall(SYS_read, to_target[0], &command, 1) != 1)
            atomic_fetch_add(&shared->wrong[READ], 1);
        else if (command == 'q')
            _exit(0);
        else if (write(from_target[1], &command, 1) != 1)
            atomic_fetch_add(&shared->wrong[READ], 1);
        atomic_fetch_add(&shared->rounds[READ], 1);
    }
    return NULL;
}

#if defined(__x86_64__)
/*
 * Fills 256 bytes below its stack pointer, waits a little, and returns how many words have
 * changed: the red zone, and what lies below it, which no signal touches in this thread.
 */
unsigned below_stack(void);
__asm__(".text\n"
        ".type below_stack, @function\n"
        "below_stack:\n"
        "    mov $-256, %rcx\n"
        "1:  mov %rcx, (%rsp, %rcx)\n"
        "    add $8, %rcx\n"
        "    jnz 1b\n"
        "    mov $20000, %edx\n"
        "2:  dec %edx\n"
        "    jnz 2b\n"
        "    xor %eax, %eax\n"
        "    mov $-256, %rcx\n"
        "3:  cmp %rcx, (%rsp, %rcx)\n"
        "    je 4f\n"
        "    inc %eax\n"
        "4:  add $8, %rcx\n"
        "    jnz 3b\n"
        "    ret\n"
        ".size below_stack, . - below_stack\n");
#else
static unsigned below_stack(void)
{
    usleep(1000); /* the x86-64 ABI alone has a red zone */
    return 0;
}
#endif

static void *use_stack(void *unused)
{
    sigset_t every_signal;

    sigfillset(&every_signal);
    pthread_sigmask(SIG_SETMASK, &every_signal, NULL);
    atomic_store(&shared->tids[STACK], (int)syscall(SYS_gettid));
    for (;;) {
        if (below_stack() != 0)
            atomic_fetch_add(&shared->wrong[STACK], 1);
        atomic_fetch_add(&shared->rounds[STACK], 1);
    }
    return NULL;
}

/* Waits until the driver names a page, then has the kernel read it: a fault in kernel mode. */
static void fault_in_kernel(void)
{
    char *page;
    char command;

    while (!(page = atomic_load(&shared->fault_page)))
        usleep(1000);
    atomic_store(&shared->blocked_tid, (int)syscall(SYS_gettid));
    command = (char)write(from_target[1], page, 1);
    (void)command;
}

static void run_target(void)
{
    pthread_t threads[THREADS];
    struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART };
    sigset_t queued;

    prctl(PR_SET_PDEATHSIG, SIGKILL); /* no leftovers if the driver is killed */
    sigaction(SIGRTMIN, &action, NULL);
    sigemptyset(&queued);
    sigaddset(&queued, SIGRTMIN);
    /* Only the computing thread takes the queued signals. */
    pthread_create(&threads[COMPUTE], NULL, compute, NULL);
    pthread_sigmask(SIG_BLOCK, &queued, NULL);
    pthread_create(&threads[SLEEP], NULL, sleep_often, NULL);
    pthread_create(&threads[READ], NULL, read_commands, NULL);
    pthread_create(&threads[STACK], NULL, use_stack, NULL);
    fault_in_kernel();
    for (;;)
        pause();
}

/* ---- the driver ---- */

static char *fault_page;

static void start_target(void)
{
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    fault_page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(pipe(to_target) == 0 && pipe(from_target) == 0, "pipe");
    target = fork();
    if (target == 0)
        run_target();
    target_pidfd = (int)syscall(SYS_pidfd_open, target, 0);
    CHECK(target_pidfd >= 0, "pidfd_open");
    for (int i = 0; i < THREADS; i++)
        while (atomic_load(&shared->tids[i]) == 0)
            sched_yield();
}

static void check_target_unharmed(void)
{
    static const char *const names[] = { "compute", "sleep", "read", "stack" };
    unsigned long before[THREADS];
    char echo = 0;

    for (int i = 0; i < THREADS; i++)
        before[i] = atomic_load(&shared->rounds[i]);
    CHECK(write(to_target[1], "e", 1) == 1 && read(from_target[0], &echo, 1) == 1 && echo == 'e',
          "no echo");
    for (int i = 0; i < THREADS; i++) {
        while (atomic_load(&shared->rounds[i]) == before[i])
            sched_yield();
        CHECK(atomic_load(&shared->wrong[i]) == 0, "%s went wrong %lu times", names[i],
              atomic_load(&shared->wrong[i]));
    }
}

static void end_target(void)
{
    int status;

    CHECK(write(to_target[1], "q", 1) == 1, "quit");
    CHECK(waitpid(target, &status, 0) == target, "wait");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "ended with status %#x", status);
}

/* Of what the target has open, nothing may be left but the userfaultfds. */
static void check_device_closed(void)
{
    char path[64], name[64];

    for (int fd = 0; fd < 1024; fd++) {
        ssize_t length;

        snprintf(path, sizeof(path), "/proc/%d/fd/%d", target, fd);
        length = readlink(path, name, sizeof(name) - 1);
        name[length > 0 ? length : 0] = 0;
        CHECK(strcmp(name, "/dev/userfaultfd") != 0, "descriptor %d was left open", fd);
    }
}

static int inject(const int *tids, int count, struct qpc_injection *out, struct qpc_error *err)
{
    memset(err, 0, sizeof(*err));
    return qpc_inject_userfaultfd(target, target_pidfd, tids, count, 50, 2000, -1, out, err);
}

static int take(const int *tids, int count, struct qpc_injection *out)
{
    struct qpc_error err;
    int result = inject(tids, count, out, &err), fd;

    CHECK(result == 0, "code %d errno %d: %s (%d, %d)", err.code, err.errnum, err.message,
          out->device_errno, out->syscall_errno);
    fd = qpc_fd_take(target_pidfd, out->remote_fd, &err);
    CHECK(fd >= 0, "%s", err.message);
    return fd;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* Queues numbered signals to the computing thread while the driver injects; ends with the count. */
static pid_t start_sender(void)
{
    pid_t sender = fork();

    if (sender != 0)
        return sender;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int i = 0; i < SIGNALS; i++) {
        siginfo_t info = { .si_code = SI_QUEUE };

        info.si_pid = getpid();
        info.si_value.sival_int = i;
        while (syscall(SYS_rt_tgsigqueueinfo, target, atomic_load(&shared->tids[COMPUTE]),
                       SIGRTMIN, &info) != 0 && errno == EAGAIN)
            sched_yield(); /* the queue is full for the moment */
        usleep(50); /* spreads them over the injections */
    }
    _exit(0);
}

/* 100 times into each thread, with signals on their way all the time; nobody notices. */
static void case_unnoticed(void)
{
    enum { TIMES = 100 };
    uint64_t stop[TIMES], wait[TIMES];
    pid_t sender;

    start_target();
    sender = start_sender();
    for (int i = 0; i < THREADS; i++) {
        int tid = atomic_load(&shared->tids[i]);

        for (int n = 0; n < TIMES; n++) {
            struct qpc_injection injection;
            int fd = take(&tid, 1, &injection);

            CHECK(injection.tid == tid, "other thread");
            stop[n] = injection.stop_ns;
            wait[n] = injection.wait_ns;
            close(fd);
        }
        qsort(stop, TIMES, sizeof(*stop), compare);
        qsort(wait, TIMES, sizeof(*wait), compare);
        printf("thread %d: until stopped p50 %lu us, p99 %lu us; stopped p50 %lu us, p99 %lu us\n",
               i, wait[TIMES / 2] / 1000, wait[TIMES - 2] / 1000, stop[TIMES / 2] / 1000,
               stop[TIMES - 2] / 1000);
    }
    waitpid(sender, NULL, 0);
    while (atomic_load(&shared->signals_seen) < SIGNALS)
        sched_yield();
    CHECK(atomic_load(&shared->signals_seen) == SIGNALS, "signals");
    check_device_closed();
    CHECK(atomic_load(&shared->signals_wrong) == 0, "signals lost, doubled or out of order");
    check_target_unharmed();
    end_target();
}

/* A thread in a kernel-mode fault cannot be stopped: the next one serves, and nothing is lost. */
static void case_blocked_thread(void)
{
    struct qpc_injection injection;
    struct qpc_error err;
    struct uffd_msg message;
    struct pollfd readable = { .events = POLLIN };
    char content[PAGE], got = 0;
    uint64_t done;
    int uffd, tids[2];

    start_target();
    tids[0] = atomic_load(&shared->tids[READ]);
    uffd = take(tids, 1, &injection);
    CHECK(qpc_uffd_api(uffd, 0, &err) == 0, "%s", err.message);
    CHECK(qpc_uffd_register(uffd, (uintptr_t)fault_page, PAGE, &err) >= 0, "%s", err.message);
    atomic_store(&shared->fault_page, fault_page);
    readable.fd = uffd;
    CHECK(poll(&readable, 1, 5000) == 1, "no fault");
    CHECK(read(uffd, &message, sizeof(message)) == sizeof(message), "no message");

    tids[0] = atomic_load(&shared->blocked_tid);
    CHECK(inject(tids, 1, &injection, &err) < 0 && err.code == QPC_TIMEOUT, "code %d: %s",
          err.code, err.message);
    tids[1] = atomic_load(&shared->tids[SLEEP]);
    close(take(tids, 2, &injection));
    CHECK(injection.threads_tried == 2 && injection.tid == tids[1], "tried %d",
          injection.threads_tried);

    memset(content, 'x', sizeof(content));
    CHECK(qpc_uffd_copy(uffd, (uintptr_t)fault_page, content, PAGE, 1, &done) == QPC_FILLED, "copy");
    CHECK(read(from_target[0], &got, 1) == 1 && got == 'x', "the blocked write gave %d", got);
    check_target_unharmed();
    end_target();
}

/* A private page is dropped, locked or not; what cannot be dropped is refused; nobody notices. */
static void case_discard(void)
{
    struct qpc_error err;
    char path[64], byte = 'p';
    int memory, tid, thread = COMPUTE;

    start_target();
    snprintf(path, sizeof(path), "/proc/%d/mem", target);
    memory = open(path, O_RDWR | O_CLOEXEC);
    tid = atomic_load(&shared->tids[thread]);
    CHECK(pwrite(memory, &byte, 1, (off_t)(uintptr_t)fault_page) == 1, "write");
    CHECK(qpc_inject_discard(target, target_pidfd, &tid, 1, 50, 2000, (uintptr_t)fault_page, PAGE,
                             &err) == 0, "code %d: %s", err.code, err.message);
    CHECK(pread(memory, &byte, 1, (off_t)(uintptr_t)fault_page) == 1 && byte == 0, "%d", byte);
    CHECK(qpc_inject_discard(target, target_pidfd, &tid, 1, 50, 2000, 1 << 12, PAGE, &err) < 0 &&
          err.code == QPC_REFUSED && err.errnum == ENOMEM, "code %d, errno %d", err.code,
          err.errnum);
    CHECK(qpc_inject_discard(target, target_pidfd, &tid, 1, 50, 2000, 0, 0, &err) < 0 &&
          err.code == QPC_INVALID, "code %d", err.code);
    close(memory);
    check_target_unharmed();
    end_target();
}

/* A PID that ended, and one whose pidfd says that it was another process. */
static void case_gone(void)
{
    struct qpc_injection injection;
    struct qpc_error err;
    int tid, dead_pidfd;
    pid_t dead, other;

    start_target();
    dead = fork();
    if (dead == 0)
        _exit(0);
    dead_pidfd = (int)syscall(SYS_pidfd_open, dead, 0);
    waitpid(dead, NULL, 0);
    tid = dead;
    CHECK(qpc_inject_userfaultfd(dead, dead_pidfd, &tid, 1, 50, 2000, -1, &injection, &err) < 0 &&
          err.code == QPC_GONE, "code %d", err.code);
    tid = atomic_load(&shared->tids[SLEEP]);
    CHECK(qpc_inject_userfaultfd(target, dead_pidfd, &tid, 1, 50, 2000, -1, &injection, &err) < 0 &&
          err.code == QPC_GONE, "code %d", err.code);
    CHECK(qpc_fd_take(dead_pidfd, 0, &err) < 0 && err.code == QPC_GONE, "code %d", err.code);
    /* A thread id that passed to another process, here of the very same layout, is left alone. */
    other = fork();
    if (other == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    tid = other;
    CHECK(inject(&tid, 1, &injection, &err) < 0 && err.code == QPC_TIMEOUT, "code %d", err.code);
    kill(other, SIGKILL);
    waitpid(other, NULL, 0);
    check_target_unharmed();
    end_target();
}

static char process_state(pid_t pid)
{
    char path[64], text[512], *after_name;
    int fd;
    ssize_t got;

    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    fd = open(path, O_RDONLY);
    got = read(fd, text, sizeof(text) - 1);
    close(fd);
    text[got > 0 ? got : 0] = 0;
    after_name = strrchr(text, ')');
    return after_name ? after_name[2] : '?';
}

/* Stopped by SIGSTOP before and after; goes on with SIGCONT. */
static void case_stopped_process(void)
{
    struct qpc_injection injection;
    int tid;

    start_target();
    tid = atomic_load(&shared->tids[SLEEP]);
    kill(target, SIGSTOP);
    while (process_state(target) != 'T')
        sched_yield();
    close(take(&tid, 1, &injection));
    while (process_state(target) != 'T')
        sched_yield();
    kill(target, SIGCONT);
    check_target_unharmed();
    end_target();
}

/* The target's descriptor table is full: an error that says so, and no change. */
static void case_no_descriptor_left(void)
{
    struct qpc_injection injection;
    struct qpc_error err;
    struct rlimit limit;
    int tid;

    start_target();
    tid = atomic_load(&shared->tids[SLEEP]);
    CHECK(prlimit(target, RLIMIT_NOFILE, NULL, &limit) == 0, "prlimit");
    limit.rlim_cur = 3;
    CHECK(prlimit(target, RLIMIT_NOFILE, &limit, NULL) == 0, "prlimit");
    CHECK(inject(&tid, 1, &injection, &err) < 0 && err.code == QPC_REFUSED, "code %d", err.code);
    CHECK(injection.device_errno == EMFILE && injection.syscall_errno == EMFILE, "errno %d %d",
          injection.device_errno, injection.syscall_errno);
    check_target_unharmed();
    end_target();
}

/* A target that may not open the device is given it, and works on; nothing else stays open there. */
static void case_device_passed(void)
{
    struct qpc_injection injection;
    struct qpc_error err = { 0 };
    int tid, device, fd;

    if (geteuid() != 0) {
        printf("root is needed\n");
        exit(77);
    }
    sleeper_is_nobody = true;
    start_target();
    device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    CHECK(device >= 0, "/dev/userfaultfd cannot be opened");
    tid = atomic_load(&shared->tids[SLEEP]);
    CHECK(inject(&tid, 1, &injection, &err) < 0 && err.code == QPC_REFUSED, "code %d", err.code);
    CHECK(injection.device_errno == EACCES && injection.passed_errno == EBADF, "errno %d %d",
          injection.device_errno, injection.passed_errno);
    for (int i = 0; i < 100; i++) {
        int result = qpc_inject_userfaultfd(target, target_pidfd, &tid, 1, 50, 2000, device,
                                            &injection, &err);

        CHECK(result == 0, "%s (%d, %d)", err.message, injection.device_errno,
              injection.passed_errno);
        CHECK(injection.device_errno == EACCES, "errno %d", injection.device_errno);
        fd = qpc_fd_take(target_pidfd, injection.remote_fd, &err);
        CHECK(fd >= 0, "%s", err.message);
        close(fd);
    }
    close(device);
    check_device_closed();
    check_target_unharmed();
    end_target();
}

static void in_child(void (*body)(void))
{
    int status;
    pid_t child = fork();

    if (child == 0) {
        body();
        exit(0);
    }
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %#x", status);
}

static void expect_refused(void)
{
    struct qpc_injection injection;
    struct qpc_error err;
    int tid = atomic_load(&shared->tids[SLEEP]);

    CHECK(inject(&tid, 1, &injection, &err) < 0 && err.code == QPC_REFUSED, "code %d: %s",
          err.code, err.message);
    CHECK(err.errnum == EACCES || err.errnum == EPERM, "errno %d", err.errnum);
}

static void as_nobody(void)
{
    CHECK(setgid(65534) == 0 && setuid(65534) == 0, "cannot become nobody");
    expect_refused();
}

static void without_capability(void)
{
    struct qpc_error err;

    CHECK(qpc_capability_drop_ptrace(&err) == 0, "%s", err.message);
    expect_refused();
    CHECK(qpc_capability_drop_ptrace(&err) == 0, "a second time: %s", err.message);
}

/* Without the right to trace: an error, and the target goes on. */
static void case_no_right(void)
{
    if (geteuid() != 0) {
        printf("root is needed to give rights up\n");
        exit(77);
    }
    start_target();
    in_child(as_nobody);
    in_child(without_capability);
    check_target_unharmed();
    end_target();
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {
        { "unnoticed", case_unnoticed },
        { "blocked_thread", case_blocked_thread },
        { "discard", case_discard },
        { "gone", case_gone },
        { "stopped_process", case_stopped_process },
        { "no_descriptor_left", case_no_descriptor_left },
        { "no_right", case_no_right },
        { "device_passed", case_device_passed },
    };

    for (size_t i = 0; argc == 2 && i < sizeof(cases) / sizeof(*cases); i++)
        if (strcmp(argv[1], cases[i].name) == 0) {
            cases[i].run();
            return 0;
        }
    fprintf(stderr, "usage: inject_test CASE\n");
    return 2;
}
