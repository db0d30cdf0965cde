#include "runtime/data/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/base/utf8.h"

namespace mt {

const char kGpt2Pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char kCl100kPattern[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const char kO200kPattern[] =
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

namespace {

constexpr size_t kMaxPatternBytes = 1 << 16;
constexpr size_t kMaxSteps = 16;
constexpr uint32_t kMatchLimit = 10'000'000;
constexpr size_t kMaxJitStackBytes = 8 << 20;

// Unicode's White_Space and Oniguruma's word characters, as members of a class.
constexpr char kSpaces[] = "\\x09-\\x0d\\x{85}\\p{Z}";
constexpr char kWords[] = "\\p{L}\\p{M}\\p{Nd}\\p{Pc}";
constexpr const char* kWordCategories[] = {"L", "M", "Nd", "Pc"};

// What Unicode 15.0, 15.1 and 16.0 have added to Unicode 14, which PCRE2 10.42 knows, by general category.
// Source: https://www.unicode.org/Public/16.0.0/ucd/DerivedAge.txt and extracted/DerivedGeneralCategory.txt.
struct Additions {
  const char* category;
  const char* members;  // Of a class.
};
constexpr Additions kAdditions[] = {
    {"Cf", "\\x{13439}-\\x{1343F}"},
    {"Ll", "\\x{1C8A}\\x{A7CD}\\x{A7DB}\\x{10D70}-\\x{10D85}\\x{1DF25}-\\x{1DF2A}"},
    {"Lm", "\\x{10D4E}\\x{10D6F}\\x{16D40}-\\x{16D42}\\x{16D6B}-\\x{16D6C}\\x{1E030}-\\x{1E06D}\\x{1E4EB}"},
    {"Lo",
     "\\x{105C0}-\\x{105F3}\\x{10D4A}-\\x{10D4D}\\x{10D4F}\\x{10EC2}-\\x{10EC4}\\x{1123F}-\\x{11240}"
     "\\x{11380}-\\x{11389}\\x{1138B}\\x{1138E}\\x{11390}-\\x{113B5}\\x{113B7}\\x{113D1}\\x{113D3}"
     "\\x{11BC0}-\\x{11BE0}\\x{11F02}\\x{11F04}-\\x{11F10}\\x{11F12}-\\x{11F33}\\x{1342F}"
     "\\x{13441}-\\x{13446}\\x{13460}-\\x{143FA}\\x{16100}-\\x{1611D}\\x{16D43}-\\x{16D6A}\\x{18CFF}"
     "\\x{1B132}\\x{1B155}\\x{1E4D0}-\\x{1E4EA}\\x{1E5D0}-\\x{1E5ED}\\x{1E5F0}\\x{2B739}"
     "\\x{2EBF0}-\\x{2EE5D}\\x{31350}-\\x{323AF}"},
    {"Lu", "\\x{1C89}\\x{A7CB}-\\x{A7CC}\\x{A7DA}\\x{A7DC}\\x{10D50}-\\x{10D65}"},
    {"Mc",
     "\\x{CF3}\\x{113B8}-\\x{113BA}\\x{113C2}\\x{113C5}\\x{113C7}-\\x{113CA}\\x{113CC}-\\x{113CD}"
     "\\x{113CF}\\x{11F03}\\x{11F34}-\\x{11F35}\\x{11F3E}-\\x{11F3F}\\x{11F41}\\x{1612A}-\\x{1612C}"},
    {"Mn",
     "\\x{897}\\x{ECE}\\x{10D69}-\\x{10D6D}\\x{10EFC}-\\x{10EFF}\\x{11241}\\x{113BB}-\\x{113C0}"
     "\\x{113CE}\\x{113D0}\\x{113D2}\\x{113E1}-\\x{113E2}\\x{11F00}-\\x{11F01}\\x{11F36}-\\x{11F3A}"
     "\\x{11F40}\\x{11F42}\\x{11F5A}\\x{13440}\\x{13447}-\\x{13455}\\x{1611E}-\\x{16129}"
     "\\x{1612D}-\\x{1612F}\\x{1E08F}\\x{1E4EC}-\\x{1E4EF}\\x{1E5EE}-\\x{1E5EF}"},
    {"Nd",
     "\\x{10D40}-\\x{10D49}\\x{116D0}-\\x{116E3}\\x{11BF0}-\\x{11BF9}\\x{11F50}-\\x{11F59}"
     "\\x{16130}-\\x{16139}\\x{16D70}-\\x{16D79}\\x{1CCF0}-\\x{1CCF9}\\x{1E4F0}-\\x{1E4F9}"
     "\\x{1E5F1}-\\x{1E5FA}"},
    {"No", "\\x{1D2C0}-\\x{1D2D3}"},
    {"Pd", "\\x{10D6E}"},
    {"Po",
     "\\x{1B4E}-\\x{1B4F}\\x{1B7F}\\x{113D4}-\\x{113D5}\\x{113D7}-\\x{113D8}\\x{11B00}-\\x{11B09}"
     "\\x{11BE1}\\x{11F43}-\\x{11F4F}\\x{16D6D}-\\x{16D6F}\\x{1E5FF}"},
    {"Sm", "\\x{10D8E}-\\x{10D8F}"},
    {"So",
     "\\x{2427}-\\x{2429}\\x{2FFC}-\\x{2FFF}\\x{31E4}-\\x{31E5}\\x{31EF}\\x{1CC00}-\\x{1CCEF}"
     "\\x{1CD00}-\\x{1CEB3}\\x{1F6DC}\\x{1F774}-\\x{1F776}\\x{1F77B}-\\x{1F77F}\\x{1F7D9}"
     "\\x{1F8B2}-\\x{1F8BB}\\x{1F8C0}-\\x{1F8C1}\\x{1FA75}-\\x{1FA77}\\x{1FA87}-\\x{1FA89}\\x{1FA8F}"
     "\\x{1FAAD}-\\x{1FAAF}\\x{1FABB}-\\x{1FABF}\\x{1FAC6}\\x{1FACE}-\\x{1FACF}\\x{1FADA}-\\x{1FADC}"
     "\\x{1FADF}\\x{1FAE8}-\\x{1FAE9}\\x{1FAF7}-\\x{1FAF8}\\x{1FBCB}-\\x{1FBEF}"},
};

// The additions to a category ("Lu") or a group of them ("L"); empty for what is neither.
std::string AdditionsTo(absl::string_view category) {
  std::string members;
  for (const Additions& row : kAdditions) {
    if (absl::string_view(row.category).substr(0, category.size()) == category) members += row.members;
  }
  return category.empty() ? "" : members;
}

// Oniguruma's syntax to PCRE2's: the same where both agree, spelled out where they do not, refused elsewhere.
// `additions`: with the classes of Unicode 16.
absl::StatusOr<std::string> Translate(absl::string_view pattern, bool additions) {
  const auto unsupported = [&](absl::string_view what) {
    return absl::FailedPreconditionError(absl::StrCat("the pattern ", pattern.substr(0, 80),
                                                      pattern.size() > 80 ? "..." : "", " has ", what,
                                                      ", which is not supported"));
  };
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    const char next = i + 1 < pattern.size() ? pattern[i + 1] : '\0';
    if (c == '\\') {
      ++i;
      // The body of \p{...}; \d is \p{Nd}.
      absl::string_view category = next == 'd' ? "Nd" : "";
      if ((next == 'p' || (next == 'P' && !in_class)) && pattern.substr(i + 1, 1) == "{") {
        category = pattern.substr(i + 2, pattern.find('}', i) - i - 2);
      }
      const std::string added = additions ? AdditionsTo(category) : "";
      if (next == 's' || next == 'w' || ((next == 'S' || next == 'W') && !in_class)) {
        const bool spaces = next == 's' || next == 'S';
        absl::StrAppend(&out, in_class ? "" : next == 's' || next == 'w' ? "[" : "[^", spaces ? kSpaces : kWords);
        for (const char* word : kWordCategories) {
          if (additions && !spaces) out += AdditionsTo(word);
        }
        if (!in_class) out += ']';
      } else if (!added.empty()) {
        const std::string members = absl::StrCat("\\p{", category, "}", added);
        absl::StrAppend(&out, in_class ? "" : next == 'P' ? "[^" : "[", members, in_class ? "" : "]");
        if (next != 'd') i = pattern.find('}', i);
      } else if (next == 'u' && i + 4 < pattern.size()) {
        const absl::string_view digits = pattern.substr(i + 1, 4);
        for (const char digit : digits) {
          if (!absl::ascii_isxdigit(static_cast<unsigned char>(digit))) return unsupported("\\u without four digits");
        }
        absl::StrAppend(&out, "\\x{", digits, "}");
        i += 4;
      } else if (next == 'p' || next == 'P' || next == 'x' || next == 'd' || next == 'D' || next == 'r' ||
                 next == 'n' || next == 't' || next == 'f') {
        size_t end = i + 1;
        if (next == 'p' || next == 'P' || (next == 'x' && pattern.substr(end, 1) == "{")) {
          end = pattern.substr(end, 1) == "{" ? pattern.find('}', end) : absl::string_view::npos;
          if (end == absl::string_view::npos) return unsupported("a \\p or \\x without braces");
          ++end;
        }
        absl::StrAppend(&out, "\\", pattern.substr(i, end - i));
        i = end - 1;
      } else if (absl::ascii_ispunct(static_cast<unsigned char>(next)) || next == ' ') {
        absl::StrAppend(&out, "\\", absl::string_view(&next, 1));
      } else {
        return unsupported(absl::StrCat("\\", absl::string_view(&next, absl::ascii_isprint(next) ? 1 : 0)));
      }
      continue;
    }
    if (in_class) {
      if (c == '[') return unsupported("a class inside a class");
      if (c == '&' && next == '&') return unsupported("an intersection of classes");
      if (c == ']') in_class = false;
    } else if (c == '[') {
      in_class = true;
      out += c;
      if (next == '^') {
        out += '^';
        ++i;
      }
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') return unsupported("an empty class");
      continue;
    } else if (c == '(' && next == '*') {
      return unsupported("a (* group");
    } else if (c == '(' && next == '?') {
      const absl::string_view rest = pattern.substr(i + 2);
      bool known = false;
      for (const char* start : {":", "=", "!", "<=", "<!", ">", "i:", "i)"}) {
        known |= rest.substr(0, absl::string_view(start).size()) == start;
      }
      if (!known) return unsupported(absl::StrCat("the group (?", rest.substr(0, 1)));
    } else if (c == '}' && next == '+') {
      return unsupported("a + after braces");
    }
    out += c;
  }
  return out;
}

}  // namespace

struct PreTokenizer::Compiled {
  std::string expression;  // Without what PCRE2's Unicode lacks.
  pcre2_code* code = nullptr;
  pcre2_match_data* match = nullptr;
  pcre2_match_context* context = nullptr;
  pcre2_jit_stack* stack = nullptr;
  bool jit = false;

  ~Compiled() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(match);
    pcre2_code_free(code);
  }
};

// What the published patterns ask of a character, as the classes in the patterns themselves say; looked up once for
// each page of 256 code points.
class PreTokenizer::Classes {
 public:
  // Of one character one bit, of several classes several.
  enum Class : uint8_t {
    kOther = 1,
    kMark = 2,
    kUpper = 4,      // Lu, Lt.
    kLower = 8,      // Ll.
    kCaseless = 16,  // Lm, Lo.
    kNumber = 32,
    kSpace = 64,
    kLetter = kUpper | kLower | kCaseless,
    kSymbol = kOther | kMark,
    kCapital = kUpper | kCaseless | kMark,  // kO200kPattern's two kinds of letters.
    kSmall = kLower | kCaseless | kMark,
  };

  static absl::StatusOr<std::unique_ptr<Classes>> Create() {
    std::unique_ptr<Classes> classes(new Classes);
    constexpr std::pair<Class, const char*> kPatterns[] = {{kMark, "\\p{M}+"},   {kUpper, "[\\p{Lu}\\p{Lt}]+"},
                                                           {kLower, "\\p{Ll}+"}, {kCaseless, "[\\p{Lm}\\p{Lo}]+"},
                                                           {kNumber, "\\p{N}+"}, {kSpace, "\\s+"}};
    for (const auto& [k, pattern] : kPatterns) {
      ASSIGN_OR_RETURN(std::unique_ptr<PreTokenizer> members, PreTokenizer::Create({{pattern}}));
      classes->members_.emplace_back(k, std::move(members));
    }
    for (int32_t c = 0; c < 0x80; ++c) classes->ascii_[static_cast<size_t>(c)] = classes->Of(c);
    return classes;
  }

  // Of the character at text[at], valid UTF-8; *size is its length.
  Class At(absl::string_view text, size_t at, size_t* size) {
    const uint8_t byte = static_cast<uint8_t>(text[at]);
    if (byte < 0x80) {
      *size = 1;
      return ascii_[byte];
    }
    const Utf8Char c = DecodeUtf8(text.substr(at));
    *size = static_cast<size_t>(c.size_bytes);
    return Of(c.code_point);
  }
  // The end of the run of `wanted` from `from` on.
  size_t EndOfRun(absl::string_view text, size_t from, Class wanted) {
    size_t size = 0;
    while (from < text.size() && (At(text, from, &size) & wanted) != 0) from += size;
    return from;
  }
  // \s+(?!\S)|\s+ at white space: the last of several goes with what follows.
  size_t EndOfSpace(absl::string_view text, size_t at) {
    size_t end = at, last = at, size = 0;
    while (end < text.size() && At(text, end, &size) == kSpace) {
      last = end;
      end += size;
    }
    return end < text.size() && last > at ? last : end;
  }
  // \s*[\r\n]+|\s+(?!\S)|\s+ at white space: up to the last line break of the run, if it has one.
  size_t EndOfLines(absl::string_view text, size_t at) {
    for (size_t i = EndOfRun(text, at, kSpace); i > at; --i) {
      if (text[i - 1] == '\r' || text[i - 1] == '\n') return i;
    }
    return EndOfSpace(text, at);
  }
  // \p{N}{1,3} at a number.
  size_t EndOfNumber(absl::string_view text, size_t at) {
    size_t size = 0;
    for (int digits = 0; digits < 3 && at < text.size() && At(text, at, &size) == kNumber; ++digits) at += size;
    return at;
  }
  // Whether kCapital*kSmall+ matches at `at`, the longest kCapital* first; *end is its end, else that of kCapital*.
  bool EndsInSmall(absl::string_view text, size_t at, size_t* end) {
    size_t last = at, size = 0;  // last: the end of the last character of both kinds.
    Class c = kOther;
    for (*end = at; *end < text.size() && ((c = At(text, *end, &size)) & kCapital) != 0;) {
      *end += size;
      if (c != kUpper) last = *end;
    }
    if (*end < text.size() && c == kLower) {
      *end = EndOfRun(text, *end, kSmall);
      return true;
    }
    if (last > at) *end = last;
    return last > at;
  }

 private:
  using Page = std::array<Class, 256>;

  Class Of(int32_t code_point) {
    std::unique_ptr<Page>& page = pages_[static_cast<size_t>(code_point) >> 8];
    if (page == nullptr) page = MakePage(code_point & ~0xFF);
    return (*page)[static_cast<size_t>(code_point & 0xFF)];
  }
  std::unique_ptr<Page> MakePage(int32_t first) const {
    auto page = std::make_unique<Page>();
    page->fill(kOther);
    std::string text;
    for (int32_t c = first; c < first + 256; ++c) {
      if (c < 0xD800 || c >= 0xE000) AppendUtf8(c, &text);
    }
    for (const auto& [k, members] : members_) {
      for (size_t begin = 0, end = 0; members->Match(0, text, end, &begin, &end);) {
        while (begin < end) {
          const Utf8Char c = DecodeUtf8(absl::string_view(text).substr(begin));
          (*page)[static_cast<size_t>(c.code_point & 0xFF)] = k;
          begin += static_cast<size_t>(c.size_bytes);
        }
      }
    }
    return page;
  }

  std::vector<std::pair<Class, std::unique_ptr<PreTokenizer>>> members_;  // Runs of them.
  std::array<Class, 128> ascii_;
  std::array<std::unique_ptr<Page>, 0x1100> pages_;
};

PreTokenizer::~PreTokenizer() = default;

absl::StatusOr<std::unique_ptr<PreTokenizer>> PreTokenizer::Create(std::vector<SplitStep> steps) {
  if (steps.size() > kMaxSteps) {
    return absl::FailedPreconditionError(absl::StrCat("has ", steps.size(), " patterns, the limit is ", kMaxSteps));
  }
  std::unique_ptr<PreTokenizer> result(new PreTokenizer);
  for (const SplitStep& step : steps) {
    if (step.pattern.size() > kMaxPatternBytes) {
      return absl::FailedPreconditionError(
          absl::StrCat("a pattern has ", step.pattern.size(), " bytes, the limit is ", kMaxPatternBytes));
    }
    auto compiled = std::make_unique<Compiled>();
    ASSIGN_OR_RETURN(compiled->expression, Translate(step.pattern, /*additions=*/false));
    ASSIGN_OR_RETURN(const std::string expression, Translate(step.pattern, /*additions=*/true));
    int error = 0;
    PCRE2_SIZE offset = 0;
    compiled->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()), expression.size(),
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, nullptr);
    if (compiled->code == nullptr) {
      PCRE2_UCHAR message[128] = {};
      pcre2_get_error_message(error, message, sizeof message);
      return absl::FailedPreconditionError(absl::StrCat("the pattern ", step.pattern.substr(0, 80),
                                                        step.pattern.size() > 80 ? "..." : "",
                                                        " is not valid: ", reinterpret_cast<const char*>(message)));
    }
    compiled->jit = pcre2_jit_compile(compiled->code, PCRE2_JIT_COMPLETE) == 0;  // Slower where it is forbidden.
    compiled->match = pcre2_match_data_create_from_pattern(compiled->code, nullptr);
    compiled->context = pcre2_match_context_create(nullptr);
    CHECK(compiled->match != nullptr && compiled->context != nullptr) << "out of memory";
    pcre2_set_match_limit(compiled->context, kMatchLimit);
    if (compiled->jit) {
      compiled->stack = pcre2_jit_stack_create(32 << 10, kMaxJitStackBytes, nullptr);
      pcre2_jit_stack_assign(compiled->context, nullptr, compiled->stack);
    }
    result->compiled_.push_back(std::move(compiled));
  }
  result->steps_ = std::move(steps);
  if (result->steps_.size() == 1) {
    const std::string& pattern = result->steps_[0].pattern;
    result->end_of_word_ = pattern == kGpt2Pattern     ? &PreTokenizer::Gpt2Word
                           : pattern == kCl100kPattern ? &PreTokenizer::Cl100kWord
                           : pattern == kO200kPattern  ? &PreTokenizer::O200kWord
                                                       : nullptr;
    if (result->end_of_word_ != nullptr) {
      ASSIGN_OR_RETURN(result->classes_, Classes::Create());
    }
  }
  return result;
}

std::string PreTokenizer::Fingerprint() const {
  std::string out = "unicode 16\n";
  for (size_t i = 0; i < compiled_.size(); ++i) {
    absl::StrAppend(&out, i == 0 ? "" : "\n", steps_[i].drop_gaps ? "!" : "", compiled_[i]->expression);
  }
  return out;
}

// The alternatives of the pattern, in its order.
size_t PreTokenizer::Gpt2Word(absl::string_view text, size_t at) const {
  size_t size = 0;
  if (text[at] == '\'') {
    const absl::string_view rest = text.substr(at + 1);
    for (const char* suffix : {"s", "t", "re", "ve", "m", "ll", "d"}) {
      const absl::string_view wanted = suffix;
      if (rest.substr(0, wanted.size()) == wanted) return at + 1 + wanted.size();
    }
  }
  const auto group = [](Classes::Class c) {
    return (c & Classes::kLetter) != 0 ? Classes::kLetter : (c & Classes::kSymbol) != 0 ? Classes::kSymbol : c;
  };
  const Classes::Class first = classes_->At(text, at, &size);
  if (first != Classes::kSpace) return classes_->EndOfRun(text, at + size, group(first));
  if (text[at] == ' ' && at + 1 < text.size()) {
    const Classes::Class second = classes_->At(text, at + 1, &size);
    if (second != Classes::kSpace) return classes_->EndOfRun(text, at + 1 + size, group(second));
  }
  return classes_->EndOfSpace(text, at);
}

namespace {

bool IsBreak(char c) { return c == '\r' || c == '\n'; }

// The end of (?i:'s|'t|'re|'ve|'m|'ll|'d) at `at`, or `at`.
size_t EndOfContraction(absl::string_view text, size_t at) {
  if (at >= text.size() || text[at] != '\'') return at;
  const std::string rest = absl::AsciiStrToLower(text.substr(at + 1, 2));
  for (const char* suffix : {"s", "\u017f", "t", "re", "ve", "m", "ll", "d"}) {  // U+017F is an s.
    const absl::string_view wanted = suffix;
    if (absl::string_view(rest).substr(0, wanted.size()) == wanted) return at + 1 + wanted.size();
  }
  return at;
}

}  // namespace

size_t PreTokenizer::Cl100kWord(absl::string_view text, size_t at) const {
  if (const size_t end = EndOfContraction(text, at); end > at) return end;
  size_t size = 0;
  const Classes::Class first = classes_->At(text, at, &size);
  const size_t next = at + size;
  if ((first & Classes::kLetter) != 0) return classes_->EndOfRun(text, next, Classes::kLetter);
  if (first == Classes::kNumber) return classes_->EndOfNumber(text, at);
  Classes::Class second = Classes::kSpace;
  if (next < text.size()) second = classes_->At(text, next, &size);
  if ((second & Classes::kLetter) != 0 && !IsBreak(text[at])) {
    return classes_->EndOfRun(text, next + size, Classes::kLetter);
  }
  if ((first & Classes::kSymbol) != 0 || (text[at] == ' ' && (second & Classes::kSymbol) != 0)) {
    size_t end = classes_->EndOfRun(text, next, Classes::kSymbol);
    while (end < text.size() && IsBreak(text[end])) ++end;
    return end;
  }
  return classes_->EndOfLines(text, at);
}

size_t PreTokenizer::O200kWord(absl::string_view text, size_t at) const {
  size_t size = 0;
  const Classes::Class first = classes_->At(text, at, &size);
  const size_t next = at + size;
  size_t end = 0;
  if ((first & Classes::kLetter) != 0) {
    classes_->EndsInSmall(text, at, &end);
    return EndOfContraction(text, end);
  }
  if (first == Classes::kNumber) return classes_->EndOfNumber(text, at);
  if (!IsBreak(text[at])) {  // Goes with letters that follow.
    if (classes_->EndsInSmall(text, next, &end)) return EndOfContraction(text, end);
    if (first == Classes::kMark) return EndOfContraction(text, next);  // Is a letter of both kinds itself.
    if (end > next) return EndOfContraction(text, end);
  }
  if ((first & Classes::kSymbol) != 0 ||
      (text[at] == ' ' && next < text.size() && (classes_->At(text, next, &size) & Classes::kSymbol) != 0)) {
    end = classes_->EndOfRun(text, next, Classes::kSymbol);
    while (end < text.size() && (IsBreak(text[end]) || text[end] == '/')) ++end;
    return end;
  }
  return classes_->EndOfLines(text, at);
}

bool PreTokenizer::Match(size_t step, absl::string_view text, size_t at, size_t* first, size_t* last) const {
  const Compiled& compiled = *compiled_[step];
  const PCRE2_SPTR subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  while (at < text.size()) {
    const int rc = compiled.jit ? pcre2_jit_match(compiled.code, subject, text.size(), at, PCRE2_NO_UTF_CHECK,
                                                  compiled.match, compiled.context)
                                : pcre2_match(compiled.code, subject, text.size(), at, PCRE2_NO_UTF_CHECK,
                                              compiled.match, compiled.context);
    if (rc < 0) return false;  // No match, or more work than the limits allow.
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(compiled.match);
    if (range[1] > range[0]) {
      *first = range[0];
      *last = range[1];
      return true;
    }
    at = range[1] + 1;  // An empty match: from the next character on.
    while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) ++at;
  }
  return false;
}

}  // namespace mt
