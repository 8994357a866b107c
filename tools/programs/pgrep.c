/* pgrep PATTERN: the pids of the other processes whose name matches; 1 if there are none. Debian's busybox has none. */
#include <ctype.h>
#include <dirent.h>
#include <regex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A process's name, without the line's end; 0 if the process is gone. */
static int read_name(const char *pid, char *name, int size) {
    char path[300];
    snprintf(path, sizeof path, "/proc/%s/comm", pid);
    FILE *file = fopen(path, "re");
    if (file == NULL) return 0;
    int found = fgets(name, size, file) != NULL;
    fclose(file);
    if (found) name[strcspn(name, "\n")] = '\0';
    return found;
}

int main(int argc, char **argv) {
    regex_t pattern;
    if (argc != 2 || regcomp(&pattern, argv[1], REG_EXTENDED | REG_NOSUB) != 0) {
        fprintf(stderr, "usage: pgrep PATTERN\n");
        return 2;
    }
    DIR *processes = opendir("/proc");
    if (processes == NULL) {
        perror("pgrep: /proc");
        return 3;
    }
    int found = 0;
    struct dirent *entry;
    while ((entry = readdir(processes)) != NULL) {
        char name[64];
        if (!isdigit((unsigned char)entry->d_name[0]) || atoi(entry->d_name) == getpid()) continue;
        if (!read_name(entry->d_name, name, sizeof name) || regexec(&pattern, name, 0, NULL, 0) != 0) continue;
        puts(entry->d_name);
        found = 1;
    }
    return !found;
}
