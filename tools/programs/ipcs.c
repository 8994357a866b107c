/* ipcs -m: the System V shared memory segments of this IPC namespace. Debian's busybox has no ipcs. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/shm.h>

#ifndef SHM_STAT_ANY
#define SHM_STAT_ANY 15
#endif

int main(int argc, char **argv) {
    if (argc != 2 || strcmp(argv[1], "-m") != 0) {
        fprintf(stderr, "usage: ipcs -m\n");
        return 1;
    }
    struct shm_info info;
    int last = shmctl(0, SHM_INFO, (struct shmid_ds *)&info);
    if (last < 0) {
        fprintf(stderr, "ipcs: %s\n", strerror(errno));
        return 1;
    }
    /* Without a digit: who looks for an id here must not find one in the head. */
    puts("------ Shared Memory Segments --------");
    printf("%-10s %-10s %-10s %-10s %-10s %-10s\n", "key", "shmid", "owner", "perms", "bytes", "nattch");
    for (int index = 0; index <= last; index++) {
        struct shmid_ds segment;
        int id = shmctl(index, SHM_STAT_ANY, &segment);
        if (id < 0) continue;
        printf("0x%08x %-10d %-10u %-10o %-10lu %-10lu\n", (unsigned)segment.shm_perm.__key, id, segment.shm_perm.uid,
               segment.shm_perm.mode & 0777, (unsigned long)segment.shm_segsz, (unsigned long)segment.shm_nattch);
    }
    return 0;
}
