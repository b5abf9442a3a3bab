// The entries of all modules.
#include "machine.h"

namespace ptx {
namespace {

std::map<std::string, std::unique_ptr<Entry>>& entries() {
  // Never destroyed: objects unregister their modules when the process ends.
  static auto* all = new std::map<std::string, std::unique_ptr<Entry>>;
  return *all;
}

}  // namespace

Entry* find_entry(const std::string& name) {
  const auto found = entries().find(name);
  return found == entries().end() ? nullptr : found->second.get();
}

std::vector<std::string> add_module(const std::string& text) {
  std::vector<std::string> names;
  for (auto& entry : parse(text)) {
    names.push_back(entry->name);
    if (!entries().emplace(names.back(), std::move(entry)).second) fail("two kernels of the name " + names.back());
  }
  return names;
}

const std::map<std::string, std::unique_ptr<Entry>>& all_entries() { return entries(); }

}  // namespace ptx
