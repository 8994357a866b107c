/*
 * portoshim-init: the first program of a container. It sets what Porto has no property for, then becomes the
 * container's command. Static, since it runs in any image; no NSS, no locale, no allocation it can do without.
 *
 *   portoshim-init [-e FIFO] [-I NSFILE] [-d DIR] [-m UMASK] [-l TYPE:SOFT:HARD]... [-u UID] [-g GID] [-G GID,GID...]
 *                  [-b HEX] [-a HEX] [-n] [-x NAME]... -- COMMAND [ARG...]
 *
 *   -e  report to this FIFO: nothing and end of file when COMMAND runs, one line of text when it can't
 *   -I  join the IPC namespace behind this file
 *   -d  working directory; made if it is missing (CRI: as the container's root)
 *   -m  umask, octal            -l  resource limit by number
 *   -u -g -G  user, group, supplementary groups: exactly these
 *   -b  bounding set            -a  ambient set, raised for COMMAND      (bit masks, see capabilities(7))
 *   -n  no_new_privs             -x  remove this variable: Porto sets some of its own
 *
 * Exit status where COMMAND can't be run, as shells have it: 127 not found, 126 not executable, 125 anything else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CANNOT_SET_UP = 125, CANNOT_EXECUTE = 126, NOT_FOUND = 127, MAX_GROUPS = 65536, LAST_POSSIBLE_CAP = 63 };

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

static void enter_directory(const char *path) {
    char part[PATH_MAX];
    if (!chdir(path))
        return;
    if (errno != ENOENT)
        fail(CANNOT_SET_UP, "working directory %s: %s", path, strerror(errno));
    if (strlen(path) >= sizeof part)
        fail(CANNOT_SET_UP, "working directory: %s", strerror(ENAMETOOLONG));
    strcpy(part, path);
    for (char *slash = part + 1;; slash++) {
        if (*slash && *slash != '/')
            continue;
        char kept = *slash;
        *slash = 0;
        if (mkdir(part, 0755) && errno != EEXIST)
            fail(CANNOT_SET_UP, "working directory %s: can't be made: %s", path, strerror(errno));
        *slash = kept;
        if (!kept)
            break;
    }
    if (chdir(path))
        fail(CANNOT_SET_UP, "working directory %s: %s", path, strerror(errno));
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

static void set_groups(char *list) {
    static gid_t groups[MAX_GROUPS];
    size_t count = 0;
    for (char *item = strtok(list, ","); item; item = strtok(NULL, ",")) {
        if (count == MAX_GROUPS)
            fail(CANNOT_SET_UP, "supplementary groups: more than %d", MAX_GROUPS);
        groups[count++] = number(item, 10, "-G");
    }
    if (setgroups(count, groups))
        fail(CANNOT_SET_UP, "supplementary groups: %s", strerror(errno));
}

static void drop_bounding(uint64_t keep) {
    for (int cap = 0; cap <= LAST_POSSIBLE_CAP; cap++) {
        if (keep >> cap & 1)
            continue;
        /* EINVAL: the kernel has no such capability. */
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) && errno != EINVAL)
            fail(CANNOT_SET_UP, "bounding set: capability %d: %s", cap, strerror(errno));
    }
}

/*
 * execve(2) computes the sets of the command from these: root gets the bounding set, others the ambient one.
 * Root keeps what it may have until then, since execve itself checks permissions with it.
 */
static void set_capabilities(uint64_t bounding, uint64_t ambient) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data))
        fail(CANNOT_SET_UP, "capabilities: %s", strerror(errno));
    uint64_t keep = geteuid() == 0 ? bounding | ambient : ambient;
    for (int half = 0; half < 2; half++) {
        data[half].permitted &= (uint32_t)(keep >> (32 * half));
        data[half].effective = data[half].permitted;
        data[half].inheritable = (uint32_t)(ambient >> (32 * half));
    }
    if (syscall(SYS_capset, &header, data))
        fail(CANNOT_SET_UP, "capabilities: %s", strerror(errno));
    for (int cap = 0; cap <= LAST_POSSIBLE_CAP; cap++)
        if (ambient >> cap & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0))
            fail(CANNOT_SET_UP, "ambient capability %d: %s", cap, strerror(errno));
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
    int no_new_privs = 0, set_bounding = 0, option;
    char *groups = NULL;
    const char *directory = NULL, *ipc = NULL;

    while ((option = getopt(argc, argv, "+e:I:d:m:l:u:g:G:b:a:nx:")) != -1) {
        switch (option) {
        case 'e':
            report_fd = open(optarg, O_WRONLY | O_CLOEXEC);
            if (report_fd < 0)
                fail(CANNOT_SET_UP, "%s: %s", optarg, strerror(errno));
            break;
        case 'I': ipc = optarg; break;
        case 'd': directory = optarg; break;
        case 'm': mask = number(optarg, 8, "-m"); break;
        case 'l': set_limit(optarg); break;
        case 'u': uid = number(optarg, 10, "-u"); break;
        case 'g': gid = number(optarg, 10, "-g"); break;
        case 'G': groups = optarg; break;
        case 'b': bounding = number(optarg, 16, "-b"); set_bounding = 1; break;
        case 'a': ambient = number(optarg, 16, "-a"); break;
        case 'n': no_new_privs = 1; break;
        case 'x': unsetenv(optarg); break;
        default: fail(CANNOT_SET_UP, "portoshim-init: unknown option");
        }
    }
    if (optind >= argc)
        fail(CANNOT_SET_UP, "portoshim-init: no command");

    if (ipc) {
        int fd = open(ipc, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || setns(fd, CLONE_NEWIPC))
            fail(CANNOT_SET_UP, "IPC namespace of the pod: %s", strerror(errno));
        close(fd);
    }
    if (directory)
        enter_directory(directory);
    if (mask >= 0)
        umask(mask);
    if (groups)
        set_groups(groups);
    if (set_bounding)
        drop_bounding(bounding);
    /* Ambient capabilities have to survive the change of user. */
    if (ambient && prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
        fail(CANNOT_SET_UP, "PR_SET_KEEPCAPS: %s", strerror(errno));
    if (gid >= 0 && setresgid(gid, gid, gid))
        fail(CANNOT_SET_UP, "group %ld: %s", gid, strerror(errno));
    if (uid >= 0 && setresuid(uid, uid, uid))
        fail(CANNOT_SET_UP, "user %ld: %s", uid, strerror(errno));
    if (set_bounding || ambient)
        set_capabilities(bounding, ambient);
    if (no_new_privs && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        fail(CANNOT_SET_UP, "no_new_privs: %s", strerror(errno));
    run(argv + optind);
}
