#include "codegen/plan/cubin.h"

#include <elf.h>

#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

// Attributes of .nv.info, each with a symbol and a number.
constexpr uint8_t kFormatSized = 4, kFrameSize = 0x11, kRegisterCount = 0x2f;

class Elf {
 public:
  explicit Elf(absl::string_view bytes) : bytes_(bytes) {}

  absl::StatusOr<std::vector<CubinFunction>> Functions() {
    if (!Read(0, header_) || std::memcmp(header_.e_ident, ELFMAG, SELFMAG) != 0 ||
        header_.e_ident[EI_CLASS] != ELFCLASS64 || header_.e_shentsize != sizeof(Elf64_Shdr)) {
      return absl::InvalidArgumentError("not a cubin: it does not begin as a 64-bit ELF file");
    }
    for (uint64_t i = 0; i < header_.e_shnum; ++i) {
      Elf64_Shdr section;
      if (header_.e_shoff > bytes_.size() || !Read(header_.e_shoff + i * sizeof(section), section)) return CutShort();
      sections_.push_back(section);
      if (section.sh_type != SHT_NOBITS) RETURN_IF_ERROR(Contents(i).status());
    }
    ASSIGN_OR_RETURN(const absl::string_view section_names, Contents(header_.e_shstrndx));
    std::vector<CubinFunction> functions;
    std::vector<size_t> of_section(sections_.size(), ~size_t{0});
    for (size_t i = 0; i < sections_.size(); ++i) {
      absl::string_view name = Text(section_names, sections_[i].sh_name);
      if (!absl::ConsumePrefix(&name, ".text.")) continue;
      of_section[i] = functions.size();
      functions.push_back({.name = std::string(name)});
    }
    for (const Elf64_Shdr& section : sections_) {
      absl::string_view name = Text(section_names, section.sh_name);
      if (!absl::ConsumePrefix(&name, ".nv.shared.")) continue;
      for (CubinFunction& function : functions) {
        if (function.name == name) function.shared_bytes = static_cast<int64_t>(section.sh_size);
      }
    }
    for (size_t i = 0; i < sections_.size(); ++i) {
      if (Text(section_names, sections_[i].sh_name) != ".nv.info") continue;
      ASSIGN_OR_RETURN(const absl::string_view info, Contents(i));
      ASSIGN_OR_RETURN(const absl::string_view symbols, Contents(sections_[i].sh_link));
      for (size_t at = 0; at + 12 <= info.size();) {
        const auto format = static_cast<uint8_t>(info[at]), attribute = static_cast<uint8_t>(info[at + 1]);
        uint16_t size = 0;
        std::memcpy(&size, info.data() + at + 2, sizeof(size));
        if (format != kFormatSized) size = 0;
        uint32_t symbol_index = 0, value = 0;
        std::memcpy(&symbol_index, info.data() + at + 4, sizeof(symbol_index));
        std::memcpy(&value, info.data() + at + 8, sizeof(value));
        at += 4 + size;
        if (format != kFormatSized || size != 8) continue;
        Elf64_Sym symbol;
        if (uint64_t{symbol_index} * sizeof(symbol) + sizeof(symbol) > symbols.size()) return CutShort();
        std::memcpy(&symbol, symbols.data() + symbol_index * sizeof(symbol), sizeof(symbol));
        if (symbol.st_shndx >= of_section.size() || of_section[symbol.st_shndx] >= functions.size()) continue;
        CubinFunction& function = functions[of_section[symbol.st_shndx]];
        if (attribute == kRegisterCount) function.registers = value;
        if (attribute == kFrameSize) function.stack_bytes = value;
      }
    }
    return functions;
  }

 private:
  static absl::Status CutShort() { return absl::InvalidArgumentError("not a cubin: it is cut short"); }

  template <typename T>
  bool Read(uint64_t at, T& to) const {
    if (at > bytes_.size() || bytes_.size() - at < sizeof(T)) return false;
    std::memcpy(&to, bytes_.data() + at, sizeof(T));
    return true;
  }
  absl::StatusOr<absl::string_view> Contents(size_t section) const {
    if (section >= sections_.size()) return CutShort();
    const Elf64_Shdr& s = sections_[section];
    if (s.sh_offset > bytes_.size() || s.sh_size > bytes_.size() - s.sh_offset) return CutShort();
    return bytes_.substr(s.sh_offset, s.sh_size);
  }
  static absl::string_view Text(absl::string_view names, uint64_t at) {
    if (at >= names.size()) return "";
    const absl::string_view rest = names.substr(at);
    return rest.substr(0, rest.find('\0'));
  }

  const absl::string_view bytes_;
  Elf64_Ehdr header_;
  std::vector<Elf64_Shdr> sections_;
};

}  // namespace

absl::StatusOr<std::vector<CubinFunction>> CubinFunctions(absl::string_view cubin) { return Elf(cubin).Functions(); }

}  // namespace mt
