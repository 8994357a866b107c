/*
 * portoshim-init: the first program of a container. It sets what Porto has no property for, then becomes the
 * container's command. Static, since it runs in any image; no NSS, no locale, no allocation it can do without.
 *
 *   portoshim-init [OPTION]... -- COMMAND [ARG...]
 *
 *   -e FIFO    report here: nothing and end of file when COMMAND runs, one line of text when it can't
 *   -w FIFO    wait here until the other side has opened and closed it: the host still has mounts to make
 *   -I NSFILE  join this IPC namespace
 *   -N NSFILE  join this UTS namespace
 *   -P NSFILE  join this PID namespace: COMMAND is a child, whose signals and exit status are passed on
 *   -p         mount its /proc, protected as Porto protects that of a container
 *   -M PATH    mask: a file reads as /dev/null, a directory is empty; a path that isn't there is fine
 *   -R PATH    make read-only        -W PATH  make writable where Porto made it read-only
 *   -O         make the root directory's own mount read-only, after everything else
 *   -d DIR     working directory; made if it is missing (CRI: as the container's root)
 *   -m UMASK   octal                 -l TYPE:SOFT:HARD  resource limit by number
 *   -u UID     -g GID     -G GID,GID...   user, group, supplementary groups: exactly these
 *   -b HEX     bounding set          -a HEX   ambient set, raised for COMMAND      (masks, see capabilities(7))
 *   -S FILE    load this seccomp filter as the last thing done       -f FLAGS  SECCOMP_FILTER_FLAG_*, as a number
 *   -E FILE    the environment: NAME=VALUE, each ended by a NUL; nothing of Porto's stays
 *   -v NAME=VALUE   a further variable
 *   -n         no_new_privs
 *
 * Mounts are made in the order of the options. What can't be set up is told by the name of CRI's field. Exit status
 * where COMMAND can't be run, as shells have it: 127 not found, 126 not executable, 125 anything else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CANNOT_SET_UP = 125, CANNOT_EXECUTE = 126, NOT_FOUND = 127, MAX_GROUPS = 65536, LAST_POSSIBLE_CAP = 63 };

static struct sock_filter filter[BPF_MAXINSNS];

static int report_fd = -1;

static void fail(int status, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (length >= (int)sizeof text)
        length = sizeof text - 1;
    /* A line no longer than PIPE_BUF arrives whole. Without a FIFO the container's own stderr has to do. */
    if (write(report_fd >= 0 ? report_fd : 2, text, length) < 0)
        status = CANNOT_SET_UP;
    _exit(status);
}

static uint64_t number(const char *text, int base, const char *what) {
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, base);
    if (errno || *end || end == text || *text == '-')
        fail(CANNOT_SET_UP, "%s: not a number: %s", what, text);
    return value;
}

static void join(const char *file, int kind, const char *what) {
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, kind))
        fail(CANNOT_SET_UP, "%s: %s", what, strerror(errno));
    close(fd);
}

/* Bind-mounts keep the flags of what they show: a remount that leaves them out is refused in a user namespace. */
static unsigned long kept_flags(const char *path) {
    struct statvfs fs;
    unsigned long flags = 0;
    if (!statvfs(path, &fs)) {
        if (fs.f_flag & ST_NOSUID) flags |= MS_NOSUID;
        if (fs.f_flag & ST_NODEV) flags |= MS_NODEV;
        if (fs.f_flag & ST_NOEXEC) flags |= MS_NOEXEC;
    }
    return flags;
}

static void mask_path(const char *path) {
    struct stat st;
    if (stat(path, &st)) {
        if (errno == ENOENT || errno == ENOTDIR)
            return;
        fail(CANNOT_SET_UP, "masked_paths: %s: %s", path, strerror(errno));
    }
    int failed;
    if (S_ISDIR(st.st_mode)) {
        failed = mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=0,mode=0555");
    } else {
        struct stat null;
        if (stat("/dev/null", &null) || !S_ISCHR(null.st_mode) || null.st_rdev != makedev(1, 3))
            fail(CANNOT_SET_UP, "masked_paths: %s: /dev/null is not what it should be", path);
        failed = mount("/dev/null", path, NULL, MS_BIND, NULL);
    }
    if (failed)
        fail(CANNOT_SET_UP, "masked_paths: %s: %s", path, strerror(errno));
}

static void readonly_mount(const char *path, const char *field) {
    if (mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | kept_flags(path), NULL))
        fail(CANNOT_SET_UP, "%s: %s: %s", field, path, strerror(errno));
}

static void readonly_path(const char *path) {
    if (mount(path, path, NULL, MS_BIND | MS_REC, NULL)) {
        if (errno == ENOENT || errno == ENOTDIR)
            return;
        fail(CANNOT_SET_UP, "readonly_paths: %s: %s", path, strerror(errno));
    }
    readonly_mount(path, "readonly_paths");
}

static void writable_path(const char *path) {
    /* EINVAL: no mount of its own, so Porto has not made it read-only. */
    if (mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | kept_flags(path), NULL) && errno != EINVAL && errno != ENOENT)
        fail(CANNOT_SET_UP, "writable path %s: %s", path, strerror(errno));
}

static void wait_for_host(const char *fifo) {
    char byte;
    int fd = open(fifo, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, &byte, 1) < 0)
        fail(CANNOT_SET_UP, "%s: %s", fifo, strerror(errno));
    close(fd);
}

/*
 * A PID namespace takes effect for children: the command becomes one, and this process stays to pass signals on and to
 * end as it ends.
 */
static void enter_pid_namespace(const char *file) {
    sigset_t all, before;
    join(file, CLONE_NEWPID, "PID namespace of the target container");
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
    pid_t child = fork();
    if (child < 0)
        fail(CANNOT_SET_UP, "fork: %s", strerror(errno));
    if (!child) {
        sigprocmask(SIG_SETMASK, &before, NULL);
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        return;
    }
    if (report_fd >= 0)
        close(report_fd);
    /* It keeps its capabilities: nobody in the pod may trace it. */
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    for (;;) {
        int number = sigwaitinfo(&all, NULL), status;
        if (number != SIGCHLD) {
            if (number > 0)
                kill(child, number);
            continue;
        }
        pid_t ended;
        while ((ended = waitpid(-1, &status, WNOHANG)) > 0)
            if (ended == child) {
                if (WIFSIGNALED(status)) {
                    signal(WTERMSIG(status), SIG_DFL);
                    sigprocmask(SIG_SETMASK, &before, NULL);
                    raise(WTERMSIG(status));
                }
                _exit(WEXITSTATUS(status));
            }
    }
}

static void mount_proc(void) {
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
        fail(CANNOT_SET_UP, "/proc of the target container: %s", strerror(errno));
    readonly_path("/proc/sys");
    readonly_path("/proc/irq");
    readonly_path("/proc/bus");
    readonly_path("/proc/sysrq-trigger");
    mask_path("/proc/kcore");
}

static void enter_directory(const char *path) {
    char part[PATH_MAX];
    if (!chdir(path))
        return;
    if (errno != ENOENT)
        fail(CANNOT_SET_UP, "working_dir: %s: %s", path, strerror(errno));
    if (strlen(path) >= sizeof part)
        fail(CANNOT_SET_UP, "working_dir: %s", strerror(ENAMETOOLONG));
    strcpy(part, path);
    for (char *slash = part + 1;; slash++) {
        if (*slash && *slash != '/')
            continue;
        char kept = *slash;
        *slash = 0;
        if (mkdir(part, 0755) && errno != EEXIST)
            fail(CANNOT_SET_UP, "working_dir: %s: can't be made: %s", path, strerror(errno));
        *slash = kept;
        if (!kept)
            break;
    }
    if (chdir(path))
        fail(CANNOT_SET_UP, "working_dir: %s: %s", path, strerror(errno));
}

static void set_limit(char *text) {
    char *soft = strchr(text, ':'), *hard = soft ? strchr(soft + 1, ':') : NULL;
    if (!hard)
        fail(CANNOT_SET_UP, "-l: TYPE:SOFT:HARD expected");
    *soft++ = *hard++ = 0;
    struct rlimit limit = {.rlim_cur = number(soft, 10, "-l"), .rlim_max = number(hard, 10, "-l")};
    int type = number(text, 10, "-l");
    if (setrlimit(type, &limit))
        fail(CANNOT_SET_UP, "resource limit %d: %s", type, strerror(errno));
}

/* The command may want to open /dev/stdout again, which asks for the owner of what is behind it. */
static void give_streams(uid_t uid) {
    for (int fd = 0; fd <= 2; fd++) {
        struct stat st;
        if (fstat(fd, &st) || st.st_uid == uid || (S_ISCHR(st.st_mode) && !isatty(fd)))
            continue;
        /* Not every stream has an owner that can be changed, and none has to. */
        if (fchown(fd, uid, -1))
            continue;
    }
}

static void set_groups(char *list) {
    static gid_t groups[MAX_GROUPS];
    size_t count = 0;
    for (char *item = strtok(list, ","); item; item = strtok(NULL, ",")) {
        if (count == MAX_GROUPS)
            fail(CANNOT_SET_UP, "supplemental_groups: more than %d", MAX_GROUPS);
        groups[count++] = number(item, 10, "-G");
    }
    if (setgroups(count, groups))
        fail(CANNOT_SET_UP, "supplemental_groups: %s", strerror(errno));
}

static void drop_bounding(uint64_t keep) {
    for (int cap = 0; cap <= LAST_POSSIBLE_CAP; cap++) {
        if (keep >> cap & 1)
            continue;
        /* EINVAL: the kernel has no such capability. */
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) && errno != EINVAL)
            fail(CANNOT_SET_UP, "capabilities: bounding set: capability %d: %s", cap, strerror(errno));
    }
}

/*
 * execve(2) computes the sets of the command from these: root gets the bounding set, others the ambient one.
 * Root keeps what it may have until then, since execve itself checks permissions with it; and whoever loads a filter
 * without no_new_privs keeps SYS_ADMIN until then, so that the filter has to allow nothing but execve.
 */
static void set_capabilities(uint64_t bounding, uint64_t ambient, int loads_filter) {
    /* What the node itself hasn't got, nobody gets. */
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data))
        fail(CANNOT_SET_UP, "capabilities: %s", strerror(errno));
    ambient &= data[0].permitted | (uint64_t)data[1].permitted << 32;
    uint64_t keep = geteuid() == 0 ? bounding | ambient : ambient;
    if (loads_filter)
        keep |= 1ULL << CAP_SYS_ADMIN;
    for (int half = 0; half < 2; half++) {
        data[half].permitted &= (uint32_t)(keep >> (32 * half));
        data[half].effective = data[half].permitted;
        data[half].inheritable = (uint32_t)(ambient >> (32 * half));
    }
    if (syscall(SYS_capset, &header, data))
        fail(CANNOT_SET_UP, "capabilities: %s", strerror(errno));
    for (int cap = 0; cap <= LAST_POSSIBLE_CAP; cap++)
        if (ambient >> cap & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0))
            fail(CANNOT_SET_UP, "capabilities: ambient %d: %s", cap, strerror(errno));
}

static void read_environment(const char *file) {
    struct stat st;
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st))
        fail(CANNOT_SET_UP, "envs: %s", strerror(errno));
    char *text = malloc(st.st_size + 1);
    off_t size = 0;
    for (ssize_t got; text && size < st.st_size; size += got) {
        got = read(fd, text + size, st.st_size - size);
        if (got <= 0)
            fail(CANNOT_SET_UP, "envs: %s", got ? strerror(errno) : "the file has shrunk");
    }
    close(fd);
    if (!text || clearenv())
        fail(CANNOT_SET_UP, "envs: %s", strerror(ENOMEM));
    text[size] = 0;
    for (char *item = text; item < text + size; item += strlen(item) + 1)
        if (putenv(item))
            fail(CANNOT_SET_UP, "envs: %s", strerror(errno));
}

static unsigned short read_filter(const char *file) {
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, filter, sizeof filter);
    if (size <= 0 || size % sizeof filter[0])
        fail(CANNOT_SET_UP, "seccomp: %s", size < 0 ? strerror(errno) : "not a filter");
    close(fd);
    return size / sizeof filter[0];
}

static void run(char *const argv[]) {
    if (!*argv[0])
        fail(NOT_FOUND, "exec: the command is empty");
    if (strchr(argv[0], '/')) {
        execv(argv[0], argv);
        fail(errno == ENOENT ? NOT_FOUND : CANNOT_EXECUTE, "exec: \"%s\": %s", argv[0], strerror(errno));
    }
    const char *path = getenv("PATH");
    int denied = 0;
    for (const char *end; path; path = *end ? end + 1 : NULL) {
        char file[PATH_MAX];
        end = strchrnul(path, ':');
        /* An empty element is the working directory, to which PATH lookup should not fall back: skipped, as Go does. */
        if (end == path)
            continue;
        if (snprintf(file, sizeof file, "%.*s/%s", (int)(end - path), path, argv[0]) >= (int)sizeof file)
            continue;
        execv(file, argv);
        if (errno != ENOENT && errno != ENOTDIR)
            denied = errno;
    }
    if (denied)
        fail(CANNOT_EXECUTE, "exec: \"%s\": %s", argv[0], strerror(denied));
    fail(NOT_FOUND, "exec: \"%s\": executable file not found in $PATH", argv[0]);
}

int main(int argc, char *argv[]) {
    uint64_t bounding = ~0ULL, ambient = 0;
    long uid = -1, gid = -1, mask = -1;
    int no_new_privs = 0, set_bounding = 0, readonly_root = 0, option;
    struct sock_fprog program = {.filter = filter};
    unsigned seccomp_flags = 0;
    char *groups = NULL;
    const char *directory = NULL;

    while ((option = getopt(argc, argv, "+e:w:I:N:P:pM:R:W:Od:m:l:u:g:G:b:a:nE:v:S:f:")) != -1) {
        switch (option) {
        case 'e':
            report_fd = open(optarg, O_WRONLY | O_CLOEXEC);
            if (report_fd < 0)
                fail(CANNOT_SET_UP, "%s: %s", optarg, strerror(errno));
            break;
        case 'w': wait_for_host(optarg); break;
        case 'I': join(optarg, CLONE_NEWIPC, "IPC namespace of the pod"); break;
        case 'N': join(optarg, CLONE_NEWUTS, "UTS namespace of the pod"); break;
        case 'P': enter_pid_namespace(optarg); break;
        case 'p': mount_proc(); break;
        case 'M': mask_path(optarg); break;
        case 'R': readonly_path(optarg); break;
        case 'W': writable_path(optarg); break;
        case 'O': readonly_root = 1; break;
        case 'd': directory = optarg; break;
        case 'm': mask = number(optarg, 8, "-m"); break;
        case 'l': set_limit(optarg); break;
        case 'u': uid = number(optarg, 10, "-u"); break;
        case 'g': gid = number(optarg, 10, "-g"); break;
        case 'G': groups = optarg; break;
        case 'b': bounding = number(optarg, 16, "-b"); set_bounding = 1; break;
        case 'a': ambient = number(optarg, 16, "-a"); break;
        case 'n': no_new_privs = 1; break;
        case 'S': program.len = read_filter(optarg); break;
        case 'f': seccomp_flags = number(optarg, 10, "-f"); break;
        case 'E': read_environment(optarg); break;
        case 'v': putenv(optarg); break;
        default: fail(CANNOT_SET_UP, "portoshim-init: unknown option");
        }
    }
    if (optind >= argc)
        fail(CANNOT_SET_UP, "portoshim-init: no command");

    if (directory)
        enter_directory(directory);
    if (readonly_root)
        readonly_mount("/", "readonly_rootfs");
    if (mask >= 0)
        umask(mask);
    if (groups)
        set_groups(groups);
    if (set_bounding)
        drop_bounding(bounding);
    /* Ambient capabilities have to survive the change of user; so has the right to load a filter. */
    if ((ambient || program.len) && prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
        fail(CANNOT_SET_UP, "PR_SET_KEEPCAPS: %s", strerror(errno));
    if (uid > 0)
        give_streams(uid);
    if (gid >= 0 && setresgid(gid, gid, gid))
        fail(CANNOT_SET_UP, "run_as_group: %ld: %s", gid, strerror(errno));
    if (uid >= 0 && setresuid(uid, uid, uid))
        fail(CANNOT_SET_UP, "run_as_user: %ld: %s", uid, strerror(errno));
    if (set_bounding || ambient || program.len)
        set_capabilities(bounding, ambient, program.len && !no_new_privs);
    if (no_new_privs && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        fail(CANNOT_SET_UP, "no_new_privs: %s", strerror(errno));
    if (program.len && syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, seccomp_flags, &program))
        fail(CANNOT_SET_UP, "seccomp: %s", strerror(errno));
    run(argv + optind);
}
