/* Says who it runs as. Its file belongs to root and is setuid, which no_new_privs has to make ineffective. */
#include <stdio.h>
#include <unistd.h>

int main(void) {
    printf("Effective uid: %u\n", (unsigned)geteuid());
    return 0;
}
