// Run a package of `tokenexit export --format compiled` from C++: which tokens leave where, and the class of every pixel.
//
//     TORCH=$(python -c "import torch, os; print(os.path.dirname(torch.__file__))")
//     g++ -std=c++20 -O2 examples/compiled_consumer.cpp -o compiled_consumer -I$TORCH/include \
//         -I$TORCH/include/torch/csrc/api/include -L$TORCH/lib -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$TORCH/lib
//     ./compiled_consumer exported/model.compiled.pt2 image.raw 360 480 0.98 0.9 0.8
//
// image.raw holds 3 x height x width float32, colours first, resized and normalised as the metadata's "preprocessing" says
// (numpy: array.astype("float32").tofile("image.raw")). The numbers behind the size are thresholds, one for each exit: those of
// the metadata's "thresholds", or any others; 1 lets no token leave.

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) {
    if (argc < 6) {
        std::cerr << "usage: compiled_consumer PACKAGE IMAGE HEIGHT WIDTH THRESHOLD...\n";
        return 2;
    }
    const int64_t height = std::stoll(argv[3]), width = std::stoll(argv[4]);
    std::vector<float> pixels(3 * height * width), thresholds;
    std::ifstream file(argv[2], std::ios::binary);
    if (!file.read(reinterpret_cast<char*>(pixels.data()), static_cast<std::streamsize>(pixels.size() * sizeof(float)))) {
        std::cerr << "compiled_consumer: " << argv[2] << " must hold " << pixels.size() << " float32\n";
        return 1;
    }
    for (int i = 5; i < argc; ++i) thresholds.push_back(std::stof(argv[i]));

    c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader loader(argv[1]);
    const auto outputs = loader.run({
        torch::from_blob(pixels.data(), {1, 3, height, width}).clone(),
        torch::from_blob(thresholds.data(), {static_cast<int64_t>(thresholds.size())}).clone(),
    });
    const auto labels = outputs[0].flatten(), exits = outputs[2].flatten();

    std::cout << "tokens that left at each exit, and those that stayed:";
    const auto left = torch::bincount(exits, {}, static_cast<int64_t>(thresholds.size()) + 1);
    for (int64_t n = 0; n < left.numel(); ++n) std::cout << ' ' << left[n].item<int64_t>();
    std::cout << "\npixels of each class:";
    const auto pixels_of = torch::bincount(labels);
    for (int64_t n = 0; n < pixels_of.numel(); ++n) std::cout << ' ' << pixels_of[n].item<int64_t>();
    std::cout << '\n';
    return 0;
}
