#include "runtime/data/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"

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

// Oniguruma's syntax to PCRE2's: the same where both agree, spelled out where they do not, refused elsewhere.
absl::StatusOr<std::string> Translate(absl::string_view pattern) {
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
      if (next == 's' || next == 'w') {
        const char* members = next == 's' ? kSpaces : kWords;
        absl::StrAppend(&out, in_class ? "" : "[", members, in_class ? "" : "]");
      } else if ((next == 'S' || next == 'W') && !in_class) {
        absl::StrAppend(&out, "[^", next == 'S' ? kSpaces : kWords, "]");
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
  std::string expression;
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
    ASSIGN_OR_RETURN(compiled->expression, Translate(step.pattern));
    int error = 0;
    PCRE2_SIZE offset = 0;
    compiled->code =
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(compiled->expression.data()), compiled->expression.size(),
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
  return result;
}

std::string PreTokenizer::Fingerprint() const {
  std::string out;
  for (size_t i = 0; i < compiled_.size(); ++i) {
    absl::StrAppend(&out, i == 0 ? "" : "\n", steps_[i].drop_gaps ? "!" : "", compiled_[i]->expression);
  }
  return out;
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
