#include "ir/base/paths.h"

#include <cstdlib>
#include <filesystem>
#include <system_error>

namespace mt {

std::string ExecutableFolder() {
  std::error_code error;
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? "" : path.parent_path().string();
}

namespace {

// share/mt/NAME of the tree that the executable is installed in; "" where there is none.
std::string InstalledFolder(const char* name) {
  const std::string folder = ExecutableFolder();
  std::error_code error;
  if (folder.empty()) return "";
  const std::filesystem::path installed = std::filesystem::path(folder).parent_path() / "share/mt" / name;
  return std::filesystem::is_directory(installed, error) ? installed.string() : "";
}

}  // namespace

std::string ModelsFolder() {
  const std::string installed = InstalledFolder("models");
  return installed.empty() ? MT_SOURCE_FOLDER "/models" : installed;
}

std::string SuitesFolder() {
  const std::string installed = InstalledFolder("suites");
  return installed.empty() ? MT_SOURCE_FOLDER "/bench/suites" : installed;
}

std::string CacheFolder() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  if (const std::string folder = variable("XDG_CACHE_HOME"); !folder.empty()) return folder + "/mt";
  const std::string home = variable("HOME");
  return home.empty() ? "" : home + "/.cache/mt";
}

}  // namespace mt
