#include "bench/lab/process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "ir/base/flags.h"

namespace mt {
namespace {

constexpr size_t kMaxErr = size_t{1} << 20;

volatile std::sig_atomic_t interrupted = 0;
volatile std::sig_atomic_t child = 0;

void OnSignal(int signal) {
  interrupted = 1;
  if (child > 0) kill(static_cast<pid_t>(child), signal);
}

}  // namespace

bool Interrupted() { return interrupted != 0; }

void CatchInterrupts() {
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

std::string CommandLine(const std::vector<std::string>& arguments) {
  return absl::StrJoin(arguments, " ",
                       [](std::string* text, const std::string& argument) { *text += ShellQuote(argument); });
}

absl::StatusOr<ProcessResult> RunProcess(const std::vector<std::string>& arguments, const std::string& out_path,
                                         const std::function<void(absl::string_view)>& on_line) {
  const auto failed = [&](absl::string_view what) {
    return absl::InternalError(absl::StrCat(arguments[0], ": ", what, ": ", std::strerror(errno)));
  };
  std::FILE* file = std::fopen(out_path.c_str(), "we");
  if (file == nullptr) return absl::DataLossError(absl::StrCat(out_path, ": ", std::strerror(errno)));
  const absl::Cleanup close_file = [&] { std::fclose(file); };
  int out[2], err[2];
  if (pipe2(out, O_CLOEXEC) != 0) return failed("pipe");
  if (pipe2(err, O_CLOEXEC) != 0) {
    close(out[0]);
    close(out[1]);
    return failed("pipe");
  }
  const absl::Cleanup close_reading = [&] {
    close(out[0]);
    close(err[0]);
  };
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);

  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(127);
    const int null = open("/dev/null", O_RDONLY);
    dup2(null, STDIN_FILENO);
    dup2(out[1], STDOUT_FILENO);
    dup2(err[1], STDERR_FILENO);
    std::signal(SIGINT, SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(out[1]);
  close(err[1]);
  if (pid < 0) return failed("fork");
  child = pid;
  if (interrupted != 0) kill(pid, SIGTERM);  // It came before there was a child to pass it on to.

  ProcessResult result;
  std::string line;
  bool written = true;
  pollfd fds[2] = {{out[0], POLLIN, 0}, {err[0], POLLIN, 0}};
  while (fds[0].fd >= 0 || fds[1].fd >= 0) {
    if (poll(fds, 2, -1) < 0) {
      if (errno == EINTR) continue;
      break;
    }
    for (pollfd& entry : fds) {
      if (entry.fd < 0 || entry.revents == 0) continue;
      char buffer[4096];
      const ssize_t n = read(entry.fd, buffer, sizeof(buffer));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        entry.fd = -1;
        continue;
      }
      const size_t size = static_cast<size_t>(n);
      if (&entry == &fds[1]) {
        result.err.append(buffer, size);
        if (result.err.size() > 2 * kMaxErr) result.err.erase(0, result.err.size() - kMaxErr);
        continue;
      }
      written = written && std::fwrite(buffer, 1, size, file) == size;
      for (size_t i = 0; i < size; ++i) {
        if (buffer[i] == '\n') {
          if (on_line) on_line(line);
          line.clear();
        } else {
          line.push_back(buffer[i]);
        }
      }
    }
  }
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  child = 0;
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  if (!written || std::fflush(file) != 0) {
    return absl::DataLossError(absl::StrCat(out_path, ": ", std::strerror(errno)));
  }
  return result;
}

}  // namespace mt
