/* An OCI runtime for conmon that starts $RUNTIME_ARGV (words between 0x1f), writes its pid and does nothing else. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    const char *pid_file = NULL;
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], "--pid-file"))
            pid_file = argv[i + 1];
    char *words[64], *rest = getenv("RUNTIME_ARGV");
    int count = 0;
    while (count < 63 && (words[count] = strsep(&rest, "\x1f")))
        count++;
    words[count] = NULL;
    pid_t pid = fork();
    if (!pid) {
        setsid();
        execvp(words[0], words);
        _exit(127);
    }
    if (pid_file) {
        FILE *file = fopen(pid_file, "w");
        fprintf(file, "%d", pid);
        fclose(file);
    }
    return 0;
}
