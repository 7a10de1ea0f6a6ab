// Run the stages of `tokenexit export --format stages` from C++: the loop of stages_host.py with OpenVINO, whose PyPI package has
// headers and libraries, and nlohmann/json (Debian: nlohmann-json3-dev). Another runtime takes the place of `Stages` alone.
//
//     OV=$(python -c "import openvino, os; print(os.path.dirname(openvino.__file__))")
//     g++ -std=c++20 -O2 examples/stages_host.cpp -o stages_host -I$OV/include $OV/libs/libopenvino.so.* -Wl,-rpath,$OV/libs
//     ./stages_host exported/stages image.raw labels.raw 0.98 0.9 0.8
//
// image.raw holds 3 x height x width float32, colours first, resized and normalised as the manifest's "preprocessing" says (numpy:
// array.astype("float32").tofile("image.raw")); labels.raw gets height x width int32. The numbers behind are thresholds, one for
// each exit, in place of the manifest's.

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <openvino/openvino.hpp>

using nlohmann::json;
using Floats = std::vector<float>;  // rows of any width, one behind the other; counts and classes too
using Named = std::map<std::string, Floats>;
using Rows = std::vector<size_t>;

struct Answer {
    Floats labels;  // of every pixel
    Rows left_at;   // of every patch
};

// The manifest, and a compiled model for each file.
class Stages {
  public:
    json about;

    explicit Stages(const std::filesystem::path& folder) {
        std::ifstream file(folder / "manifest.json");
        if (!file) throw std::runtime_error("no manifest.json in " + folder.string());
        about = json::parse(file);
        if (about["format"] != "tokenexit stages" || about["version"] != 2)
            throw std::runtime_error("manifest.json must be of tokenexit stages 2");
        ov::Core core;
        for (const auto& stage : about["stages"])
            for (const auto& each : stage["files"]) {
                const std::string name = each["file"];
                requests[name] = core.compile_model((folder / name).string(), "CPU", ov::hint::inference_precision(ov::element::f32))
                                     .create_infer_request();
            }
    }

    // Run a stage in the smallest of its files that holds the tokens, with zeros behind them. rows: tokens, prefix included.
    Named run(const std::string& name, Named given, size_t rows = 0) {
        const auto& file = smallest(name, rows);
        auto& request = requests.at(file["file"]);
        given["live"] = {static_cast<float>(rows)};
        for (const auto& [key, expected] : file["inputs"].items()) {
            const bool whole = expected["dtype"] == "int32";
            ov::Tensor tensor(whole ? ov::element::i32 : ov::element::f32, expected["shape"].get<ov::Shape>());
            const Floats& values = given.at(key);
            if (whole) {
                std::fill_n(tensor.data<int32_t>(), tensor.get_size(), 0);
                std::copy(values.begin(), values.end(), tensor.data<int32_t>());
            } else {
                std::fill_n(tensor.data<float>(), tensor.get_size(), 0.0f);
                std::copy(values.begin(), values.end(), tensor.data<float>());
            }
            request.set_tensor(key, tensor);
        }
        request.infer();
        Named found;
        for (const auto& [key, expected] : file["outputs"].items()) {
            const ov::Tensor tensor = request.get_tensor(key);
            found[key].resize(tensor.get_size());
            if (expected["dtype"] == "int32")
                std::copy_n(tensor.data<int32_t>(), tensor.get_size(), found[key].begin());
            else
                std::copy_n(tensor.data<float>(), tensor.get_size(), found[key].begin());
        }
        return found;
    }

  private:
    std::map<std::string, ov::InferRequest> requests;

    const json& smallest(const std::string& name, size_t rows) const {
        const size_t prefix = about["prefix_tokens"], count = rows > prefix ? rows - prefix : 0;
        for (const auto& stage : about["stages"])
            if (stage["name"] == name)
                for (const auto& file : stage["files"])
                    if (file["tokens"].is_null() || file["tokens"] >= count) return file;
        throw std::runtime_error("no file of stage " + name + " holds " + std::to_string(count) + " tokens");
    }
};

// Whether each of the first `count` tokens scores above its exit's threshold, or that of its class.
std::vector<bool> confident(const Named& found, size_t count, const Floats& threshold) {
    std::vector<bool> above(count);
    for (size_t i = 0; i < count; ++i)
        above[i] = found.at("score")[i] > threshold[threshold.size() > 1 ? static_cast<size_t>(found.at("label")[i]) : 0];
    return above;
}

Floats gather(const Floats& rows, const Rows& at, size_t width) {
    Floats out;
    for (const size_t i : at) out.insert(out.end(), rows.begin() + i * width, rows.begin() + (i + 1) * width);
    return out;
}

// Dynamic Token Pruning: easy tokens leave with the exit's answer, but for the most confident of each class or window.
Answer dtop(Stages& stages, const Floats& image, const std::vector<Floats>& thresholds) {
    const json &about = stages.about, &rule = about["rule"];
    const size_t prefix = about["prefix_tokens"], width = about["width"], classes = about["classes"].size();
    const size_t exits = about["exits_after_blocks"].size(), cells = about["grid"][0].get<size_t>() * about["grid"][1].get<size_t>();
    const size_t columns = about["grid"][1], side = rule["keep_in_window"];
    const size_t keep = rule["keep_per_class"], stop = rule["stop"].is_null() ? exits + 1 : rule["stop"].get<size_t>();
    Floats tokens = stages.run("embed", {{"image", image}}).at("tokens"), canvas(cells * classes);
    Rows place(prefix + cells), left_at(cells, exits);
    std::iota(place.begin(), place.end(), 0);
    Named found;
    for (size_t n = 0;; ++n) {
        const std::string number = std::to_string(n + 1);
        const size_t rows = place.size(), count = rows - prefix;
        tokens = stages.run("span" + number, {{"tokens", tokens}, {"place", Floats(place.begin(), place.end())}}, rows).at("next_tokens");
        tokens.resize(rows * width);
        found = stages.run(n < exits ? "exit" + number : "decode", {{"tokens", tokens}}, rows);
        for (size_t i = 0; i < count; ++i) {
            const size_t cell = place[prefix + i] - prefix;
            std::copy_n(found.at("rows").begin() + i * classes, classes, canvas.begin() + cell * classes);
            left_at[cell] = n;
        }
        if (n == exits || n + 1 == stop) break;
        auto leaves = confident(found, count, thresholds[n]);
        const Floats &score = found.at("score"), &label = found.at("label");
        Rows easy;
        for (size_t i = 0; i < count; ++i)
            if (leaves[i]) easy.push_back(i);
        std::stable_sort(easy.begin(), easy.end(), [&](size_t a, size_t b) { return score[a] > score[b]; });
        std::map<float, size_t> of_class;
        std::map<size_t, size_t> of_window;
        for (const size_t i : easy) {
            if (of_class[label[i]]++ < keep) leaves[i] = false;
            const size_t cell = place[prefix + i] - prefix;
            if (side && of_window[cell / columns / side * cells + cell % columns / side]++ == 0) leaves[i] = false;
        }
        Rows stays(prefix);
        std::iota(stays.begin(), stays.end(), 0);
        for (size_t i = 0; i < count; ++i)
            if (!leaves[i]) stays.push_back(prefix + i);
        tokens = gather(tokens, stays, width);
        for (size_t i = 0; i < stays.size(); ++i) place[i] = place[stays[i]];
        place.resize(stays.size());
    }
    Named last = {{"canvas", canvas}};
    if (found.count("presence")) last["presence"] = found.at("presence");
    return {stages.run("finish", last).at("labels"), left_at};
}

// Dynamic Token-Pass: stopped tokens keep their features, and the class token takes up their mean.
Answer dovit(Stages& stages, const Floats& image, const std::vector<Floats>& thresholds) {
    const json &about = stages.about, &rule = about["rule"];
    const size_t prefix = about["prefix_tokens"], width = about["width"], exits = about["exits_after_blocks"].size();
    const size_t cells = about["grid"][0].get<size_t>() * about["grid"][1].get<size_t>(), all = prefix + cells;
    const float weight = rule["blend_weight"], trigger = rule["blend_trigger"];
    Floats full = stages.run("embed", {{"image", image}}).at("tokens"), before;
    Rows place(all), left_at(cells, exits);
    std::iota(place.begin(), place.end(), 0);
    std::vector<bool> stopped(cells, false);
    for (size_t n = 0;; ++n) {
        const std::string number = std::to_string(n + 1);
        const Floats at(place.begin(), place.end());
        if (!place.empty()) {
            const Named given = {{"tokens", gather(full, place, width)}, {"place", at}};
            const Floats next = stages.run("span" + number, given, place.size()).at("next_tokens");
            for (size_t i = 0; i < place.size(); ++i)
                std::copy_n(next.begin() + i * width, width, full.begin() + place[i] * width);
        }
        for (size_t i = prefix; i < place.size(); ++i) left_at[place[i] - prefix] = n;
        if (n == exits) break;
        const bool everybody = rule["scores"] == "all";
        Rows seen(place.begin() + prefix, place.end());
        if (everybody) {
            seen.resize(cells);
            std::iota(seen.begin(), seen.end(), prefix);
        }
        const Named found = stages.run("exit" + number, {{"tokens", everybody ? full : gather(full, place, width)}}, prefix + seen.size());
        const auto sure = confident(found, seen.size(), thresholds[n]);
        Floats score(cells);
        std::vector<bool> stops(cells, false);
        for (size_t i = 0; i < seen.size(); ++i) {
            score[seen[i] - prefix] = found.at("score")[i];
            stops[seen[i] - prefix] = sure[i];
        }
        for (size_t i = 0; i < cells; ++i) {
            const bool dull = !rule["min_improvement"].is_null() && n > 0 && score[i] - before[i] < rule["min_improvement"].get<float>();
            if (stops[i] || dull) stopped[i] = true;
        }
        before = score;
        const auto gone = static_cast<size_t>(std::count(stopped.begin(), stopped.end(), true));
        if (weight > 0 && static_cast<double>(gone) / static_cast<double>(all) > trigger)
            for (size_t c = 0; c < width; ++c) {
                double sum = 0;
                for (size_t i = 0; i < cells; ++i)
                    if (stopped[i]) sum += full[(prefix + i) * width + c];
                full[c] = (1 - weight) * full[c] + weight * static_cast<float>(sum / static_cast<double>(gone));
            }
        place.resize(prefix);
        std::iota(place.begin(), place.end(), 0);
        for (size_t i = 0; i < cells; ++i)
            if (!stopped[i]) place.push_back(prefix + i);
    }
    return {stages.run("finish", {{"tokens", full}}, all).at("labels"), left_at};
}

int run(int argc, char** argv) {
    Stages stages(argv[1]);
    const json& about = stages.about;
    const size_t exits = about["exits_after_blocks"].size();
    std::vector<Floats> thresholds;
    for (const auto& one : about["thresholds"]) thresholds.push_back(one.is_array() ? one.get<Floats>() : Floats{one.get<float>()});
    if (argc > 4) thresholds.clear();
    for (int i = 4; i < argc; ++i) thresholds.push_back({std::stof(argv[i])});
    if (thresholds.size() != exits) throw std::runtime_error("there must be " + std::to_string(exits) + " thresholds, one for each exit");

    Floats image(3 * about["image_size"][0].get<size_t>() * about["image_size"][1].get<size_t>());
    std::ifstream file(argv[2], std::ios::binary);
    if (!file.read(reinterpret_cast<char*>(image.data()), static_cast<std::streamsize>(image.size() * sizeof(float))))
        throw std::runtime_error(std::string(argv[2]) + " must hold " + std::to_string(image.size()) + " float32");

    const auto [labels, left_at] = (about["method"]["name"] == "dtop" ? dtop : dovit)(stages, image, thresholds);
    const std::vector<int32_t> whole(labels.begin(), labels.end());
    std::ofstream out(argv[3], std::ios::binary);
    if (!out.write(reinterpret_cast<const char*>(whole.data()), static_cast<std::streamsize>(whole.size() * sizeof(int32_t))))
        throw std::runtime_error(std::string(argv[3]) + " cannot be written");

    std::cout << "tokens that left at each exit, and those that stayed:";
    for (size_t n = 0; n <= exits; ++n) std::cout << ' ' << std::count(left_at.begin(), left_at.end(), n);
    std::cout << "\nclasses:";
    for (const int32_t k : std::set<int32_t>(whole.begin(), whole.end())) std::cout << ' ' << about["classes"][k].get<std::string>();
    std::cout << '\n';
    return 0;
}

int main(int argc, char** argv) {
    if (argc < 4) {
        std::cerr << "usage: stages_host STAGES IMAGE LABELS [THRESHOLD...]\n";
        return 2;
    }
    try {
        return run(argc, argv);
    } catch (const std::exception& error) {
        std::cerr << "stages_host: " << error.what() << '\n';
        return 1;
    }
}
