/*
 * A web server that looks like nginx or like Apache's httpd from outside, by the name it is started under: processes
 * and their titles, pid file, log files, signals. It answers every request with one small page.
 *
 * As with those two, the master keeps root and writes the pid file, a worker of another user answers, and the logs
 * are opened by path (the images link them to /dev/stdout and /dev/stderr).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_TIMEOUT_S 10
#define MAX_REQUEST 16384

struct look {
    const char *name;
    const char *program;
    const char *config; /* where `listen PORT;` stands; NULL: port 80 */
    const char *pid_file;
    const char *access_log;
    const char *error_log;
    const char *page;
    uid_t worker; /* user and group of the worker */
    int graceful; /* the signal that ends it once requests are answered: the image's StopSignal */
};

static const struct look NGINX = {
    "nginx", "/usr/sbin/nginx", "/etc/nginx/conf.d/default.conf", "/var/run/nginx.pid", "/var/log/nginx/access.log",
    "/var/log/nginx/error.log", "<html><head><title>nginx</title></head><body>Served by nginx.</body></html>\n", 101,
    SIGQUIT,
};
static const struct look HTTPD = {
    "httpd", "/usr/local/apache2/bin/httpd", NULL, "/usr/local/apache2/logs/httpd.pid", "/proc/self/fd/1",
    "/proc/self/fd/2", "<html><body>Served by httpd.</body></html>\n", 1, SIGWINCH,
};

static const char MASTER[] = "nginx: master process ";
static const char WORKER[] = "nginx: worker process";

static const struct look *look;
static int access_log = STDOUT_FILENO, error_log = STDERR_FILENO;

__attribute__((format(printf, 2, 3))) static void say(const char *level, const char *format, ...) {
    char text[512], when[64];
    time_t now = time(NULL);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    strftime(when, sizeof when, "%Y/%m/%d %H:%M:%S", gmtime(&now));
    dprintf(error_log, "%s [%s] %d: %s: %s\n", when, level, getpid(), look->name, text);
}

__attribute__((noreturn)) static void fail(const char *what) {
    say("emerg", "%s: %s", what, strerror(errno));
    exit(1);
}

static int open_log(const char *path) {
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) fail(path);
    return fd;
}

static int configured_port(void) {
    int port = 80;
    FILE *file = look->config == NULL ? NULL : fopen(look->config, "re");
    if (file == NULL) return port;
    char line[256];
    while (fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, " listen %d", &port) == 1) break;
    fclose(file);
    return port;
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (fd < 0) fail("socket()");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) fail("bind()");
    if (listen(fd, 128) < 0) fail("listen()");
    return fd;
}

static void write_pid_file(void) {
    FILE *file = fopen(look->pid_file, "we");
    if (file == NULL) fail(look->pid_file);
    fprintf(file, "%d\n", getpid());
    if (fclose(file) != 0) fail(look->pid_file);
}

/* -- the worker -------------------------------------------------------------------------------------------------- */

static void answer(int client, const struct sockaddr_in *from) {
    char request[MAX_REQUEST + 1], line[200], when[64];
    size_t size = 0;
    struct timeval patience = {.tv_sec = REQUEST_TIMEOUT_S};
    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    do {
        ssize_t count = read(client, request + size, MAX_REQUEST - size);
        if (count <= 0) return;
        size += (size_t)count;
        request[size] = '\0';
    } while (strstr(request, "\r\n\r\n") == NULL && size < MAX_REQUEST);
    snprintf(line, sizeof line, "%.*s", (int)strcspn(request, "\r\n"), request);
    size_t length = strlen(look->page);
    dprintf(client,
            "HTTP/1.1 200 OK\r\nServer: %s\r\nContent-Type: text/html\r\nContent-Length: %zu\r\n"
            "Connection: close\r\n\r\n%s",
            look->name, length, strncmp(line, "HEAD ", 5) == 0 ? "" : look->page);
    time_t now = time(NULL);
    strftime(when, sizeof when, "%d/%b/%Y:%H:%M:%S +0000", gmtime(&now));
    dprintf(access_log, "%s - - [%s] \"%s\" 200 %zu\n", inet_ntoa(from->sin_addr), when, line, length);
}

__attribute__((noreturn)) static void work(int listener, char *title) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (geteuid() == 0 && (setgroups(0, NULL) < 0 || setgid(look->worker) < 0 || setuid(look->worker) < 0))
        fail("becoming the worker's user");
    if (title != NULL) { /* the room of the master's longer title is free to be overwritten */
        memset(title, 0, strlen(title));
        memcpy(title, WORKER, sizeof WORKER);
    }
    signal(SIGPIPE, SIG_IGN);
    for (;;) {
        struct sockaddr_in from;
        socklen_t size = sizeof from;
        int client = accept4(listener, (struct sockaddr *)&from, &size, SOCK_CLOEXEC);
        if (client >= 0) {
            answer(client, &from);
            close(client);
        } else if (errno != EINTR && errno != ECONNABORTED) {
            fail("accept()");
        }
    }
}

/* -- the master -------------------------------------------------------------------------------------------------- */

/* Starts anew under the title that nginx gives itself. */
static void become_master(char **argv) {
    char title[512];
    size_t size = (size_t)snprintf(title, sizeof title, "%s", MASTER);
    for (int i = 0; argv[i] != NULL && size < sizeof title; i++)
        size += (size_t)snprintf(title + size, sizeof title - size, "%s%s", i > 0 ? " " : "", argv[i]);
    char *arguments[] = {title, NULL};
    execv(look->program, arguments);
    fail(look->program);
}

/* Waits for a signal to end, and ends the worker. A worker that ends by itself is a failure. */
static int watch_over(pid_t worker, const sigset_t *signals) {
    for (;;) {
        int number = sigwaitinfo(signals, NULL), status;
        if (number == SIGCHLD) {
            for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
                if (pid == worker) {
                    say("alert", "the worker %d ended with status %d", pid, status);
                    unlink(look->pid_file);
                    return 1;
                }
        } else if (number == SIGTERM || number == SIGINT || number == look->graceful) {
            say("notice", "signal %d (%s) received, exiting", number, strsignal(number));
            kill(worker, SIGTERM);
            while (waitpid(worker, &status, 0) < 0 && errno == EINTR) continue;
            unlink(look->pid_file);
            return 0;
        }
    }
}

int main(int argc, char **argv) {
    if (argc == 0) return 1;
    const char *slash = strrchr(argv[0], '/');
    int is_master = strncmp(argv[0], MASTER, strlen(MASTER)) == 0;
    look = is_master || strcmp(slash != NULL ? slash + 1 : argv[0], NGINX.name) == 0 ? &NGINX : &HTTPD;
    if (look == &NGINX && !is_master) become_master(argv);

    sigset_t signals;
    sigemptyset(&signals);
    const int waited_for[] = {SIGTERM, SIGINT, SIGQUIT, SIGWINCH, SIGCHLD};
    for (size_t i = 0; i < sizeof waited_for / sizeof *waited_for; i++) sigaddset(&signals, waited_for[i]);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);

    error_log = open_log(look->error_log);
    access_log = open_log(look->access_log);
    int port = configured_port(), listener = listen_on(port);
    write_pid_file();
    pid_t worker = fork();
    if (worker < 0) fail("fork()");
    if (worker == 0) {
        sigprocmask(SIG_UNBLOCK, &signals, NULL);
        work(listener, is_master ? argv[0] : NULL);
    }
    say("notice", "serving on port %d", port);
    return watch_over(worker, &signals);
}
