/*
 * /bin/sh in front of a busybox whose shell runs applets inside itself.
 *
 * Debian's static busybox never looks into PATH for a name that is one of its applets, so `sh -c ls` works even
 * where /bin/ls is masked. The shells of usual images do look. Here a script of one simple command is run as they
 * run it: found in PATH, executed, and an error said in their words. All else is busybox's, as before.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BUSYBOX "/bin/busybox"
#define DEFAULT_PATH "/sbin:/usr/sbin:/bin:/usr/bin"
#define MAX_WORDS 64

/* Characters that mean nothing to a shell. */
static const char PLAIN[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:,+@%-";

/* What the shell does itself: builtins and reserved words of busybox's ash. */
static const char *const OWN[] = {
    ".", ":", "alias", "bg", "break", "case", "cd", "chdir", "command", "continue", "do", "done", "echo", "elif",
    "else", "esac", "eval", "exec", "exit", "export", "false", "fc", "fg", "fi", "for", "function", "getopts",
    "hash", "help", "history", "if", "in", "jobs", "kill", "let", "local", "printf", "pwd", "read", "readonly",
    "return", "select", "set", "shift", "source", "test", "then", "time", "times", "trap", "true", "type",
    "ulimit", "umask", "unalias", "unset", "until", "wait", "while", NULL,
};

static int is_own(const char *word) {
    for (int i = 0; OWN[i] != NULL; i++)
        if (strcmp(word, OWN[i]) == 0) return 1;
    return 0;
}

/* Splits a script that is one simple command into words; 0 if it is anything else. */
static int split(char *script, char **words) {
    int count = 0;
    for (char *word = strtok(script, " \t"); word != NULL; word = strtok(NULL, " \t")) {
        if (count == MAX_WORDS || word[strspn(word, PLAIN)] != '\0') return 0;
        words[count++] = word;
    }
    words[count] = NULL;
    return count > 0 && !is_own(words[0]);
}

/* Executes a command as a shell finds it; returns, with the error, when it can't be executed. */
static int run(char **words) {
    if (strchr(words[0], '/') != NULL) {
        execv(words[0], words);
        return errno;
    }
    const char *search = getenv("PATH");
    if (search == NULL) search = DEFAULT_PATH;
    int error = ENOENT;
    for (;;) {
        size_t length = strcspn(search, ":");
        char path[PATH_MAX];
        int size = length == 0 ? snprintf(path, sizeof path, "./%s", words[0])
                               : snprintf(path, sizeof path, "%.*s/%s", (int)length, search, words[0]);
        struct stat found;
        if (size > 0 && (size_t)size < sizeof path && stat(path, &found) == 0) {
            if (S_ISREG(found.st_mode)) execv(path, words);
            error = S_ISREG(found.st_mode) ? errno : EACCES;
            if (error != EACCES) return error;
        }
        if (search[length] == '\0') return error;
        search += length + 1;
    }
}

int main(int argc, char **argv) {
    char *words[MAX_WORDS + 1];
    if (argc == 3 && strcmp(argv[1], "-c") == 0) {
        char *script = strdup(argv[2]);
        if (script != NULL && split(script, words)) {
            int error = run(words);
            if (error == ENOENT) {
                fprintf(stderr, "%s: %s: not found\n", argv[0], words[0]);
                return 127;
            }
            if (error != ENOEXEC) { /* a script without #! is for busybox to read */
                fprintf(stderr, "%s: %s: %s\n", argv[0], words[0], strerror(error));
                return 126;
            }
        }
    }
    execv(BUSYBOX, argv);
    fprintf(stderr, "%s: %s: %s\n", argv[0], BUSYBOX, strerror(errno));
    return 126;
}
