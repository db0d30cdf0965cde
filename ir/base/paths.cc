#include "ir/base/paths.h"

#include <filesystem>
#include <system_error>

namespace mt {

std::string ExecutableFolder() {
  std::error_code error;
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? "" : path.parent_path().string();
}

std::string ModelsFolder() {
  const std::string folder = ExecutableFolder();
  std::error_code error;
  if (!folder.empty()) {
    const std::filesystem::path installed = std::filesystem::path(folder).parent_path() / "share/mt/models";
    if (std::filesystem::is_directory(installed, error)) return installed.string();
  }
  return MT_SOURCE_FOLDER "/models";
}

}  // namespace mt
