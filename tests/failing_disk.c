/* System calls that fail below a folder: the n-th of them, or all from the n-th on.

   Preloaded into a process (LD_PRELOAD), which says with `failing_disk_arm` what shall fail. It
   stands between the process and the C library, so that libraries in C++ meet it too. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[PATH_MAX], last[PATH_MAX + 64];
static long wanted, counted;
static int code, lasting;

/* An empty prefix: nothing fails. Number 0: calls are only counted. */
void failing_disk_arm(const char *below, long number, int error, int stays) {
  snprintf(prefix, sizeof prefix, "%s", below);
  wanted = number, code = error, lasting = stays, counted = 0, last[0] = 0;
}
long failing_disk_count(void) { return counted; }
const char *failing_disk_last(void) { return last; }

static int fails(const char *call, const char *path) {
  if (!prefix[0] || !path || strncmp(path, prefix, strlen(prefix))) return 0;
  long number = __sync_add_and_fetch(&counted, 1);
  if (!wanted || (lasting ? number < wanted : number != wanted)) return 0;
  if (number == wanted) snprintf(last, sizeof last, "%s %s", call, path + strlen(prefix));
  errno = code;
  return 1;
}

/* The path of an open file, or of a name relative to one. */
static const char *of_file(int file, char *buffer) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, buffer, PATH_MAX - 1);
  if (length < 0) return NULL;
  buffer[length] = 0;
  return buffer;
}
static const char *of_name(int folder, const char *name, char *buffer) {
  if (name[0] == '/') return name;
  if (folder == AT_FDCWD ? !getcwd(buffer, PATH_MAX) : !of_file(folder, buffer)) return NULL;
  size_t length = strlen(buffer);
  snprintf(buffer + length, 2 * PATH_MAX - length, "/%s", name);
  return buffer;
}
static int file_fails(const char *call, int file) {
  char buffer[PATH_MAX];
  return prefix[0] && fails(call, of_file(file, buffer));
}
static int name_fails(const char *call, int folder, const char *name) {
  char buffer[2 * PATH_MAX];
  return prefix[0] && fails(call, of_name(folder, name, buffer));
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define BY_FILE(type, name, parameters, arguments) \
  type name parameters { return file_fails(#name, file) ? -1 : NEXT(name) arguments; }
#define BY_NAME(name, parameters, arguments) \
  int name parameters { return name_fails(#name, AT_FDCWD, path) ? -1 : NEXT(name) arguments; }
#define BY_NAME_AT(name, parameters, arguments) \
  int name parameters { return name_fails(#name, folder, path) ? -1 : NEXT(name) arguments; }
#define MODE \
  va_list rest; \
  va_start(rest, flags); \
  mode_t mode = va_arg(rest, mode_t); \
  va_end(rest);
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    MODE return name_fails(#name, AT_FDCWD, path) ? -1 : NEXT(name)(path, flags, mode); \
  }
#define OPEN_AT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    MODE return name_fails(#name, folder, path) ? -1 : NEXT(name)(folder, path, flags, mode); \
  }

OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)
BY_FILE(ssize_t, read, (int file, void *b, size_t n), (file, b, n))
BY_FILE(ssize_t, pread, (int file, void *b, size_t n, off_t o), (file, b, n, o))
BY_FILE(ssize_t, pread64, (int file, void *b, size_t n, off64_t o), (file, b, n, o))
BY_FILE(ssize_t, write, (int file, const void *b, size_t n), (file, b, n))
BY_FILE(ssize_t, pwrite, (int file, const void *b, size_t n, off_t o), (file, b, n, o))
BY_FILE(ssize_t, pwrite64, (int file, const void *b, size_t n, off64_t o), (file, b, n, o))
BY_FILE(ssize_t, writev, (int file, const struct iovec *v, int n), (file, v, n))
BY_FILE(ssize_t, pwritev, (int file, const struct iovec *v, int n, off_t o), (file, v, n, o))
BY_FILE(ssize_t, pwritev64, (int file, const struct iovec *v, int n, off64_t o), (file, v, n, o))
BY_FILE(int, fsync, (int file), (file))
BY_FILE(int, fdatasync, (int file), (file))
BY_FILE(int, ftruncate, (int file, off_t n), (file, n))
BY_FILE(int, ftruncate64, (int file, off64_t n), (file, n))
BY_FILE(int, flock, (int file, int operation), (file, operation))
BY_FILE(int, fstat, (int file, struct stat *s), (file, s))
BY_FILE(int, fstat64, (int file, struct stat64 *s), (file, s))
BY_NAME(stat, (const char *path, struct stat *s), (path, s))
BY_NAME(stat64, (const char *path, struct stat64 *s), (path, s))
BY_NAME(lstat, (const char *path, struct stat *s), (path, s))
BY_NAME(lstat64, (const char *path, struct stat64 *s), (path, s))
BY_NAME(statvfs, (const char *path, struct statvfs *s), (path, s))
BY_NAME(statvfs64, (const char *path, struct statvfs64 *s), (path, s))
BY_NAME(mkdir, (const char *path, mode_t mode), (path, mode))
BY_NAME(rmdir, (const char *path), (path))
BY_NAME(unlink, (const char *path), (path))
BY_NAME(rename, (const char *path, const char *to), (path, to))
BY_NAME(link, (const char *path, const char *to), (path, to))
BY_NAME(chmod, (const char *path, mode_t mode), (path, mode))
BY_NAME_AT(fstatat, (int folder, const char *path, struct stat *s, int f), (folder, path, s, f))
BY_NAME_AT(fstatat64, (int folder, const char *path, struct stat64 *s, int f), (folder, path, s, f))
BY_NAME_AT(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode))
BY_NAME_AT(unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
BY_NAME_AT(renameat, (int folder, const char *path, int d, const char *to), (folder, path, d, to))

/* Closes the file too when it fails, as Linux does: what was written may be lost, not the number. */
int close(int file) {
  int failed = file_fails("close", file), error = errno;
  int result = NEXT(close)(file);
  return failed ? (errno = error, -1) : result;
}
DIR *opendir(const char *path) {
  return name_fails("opendir", AT_FDCWD, path) ? NULL : NEXT(opendir)(path);
}
DIR *fdopendir(int file) { return file_fails("fdopendir", file) ? NULL : NEXT(fdopendir)(file); }
