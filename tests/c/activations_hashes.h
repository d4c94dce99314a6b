// activations_hashes.h - of activations_test.cc: the hashes of {value f32, derivative f32, value f64, derivative f64}.
// clang-format off
{0x60ce42fb34e28b59, 0xc871a6659ff0ffc4, 0x87cc5be818ce6c34, 0xb94fd41bc7061e09},  // identity
{0xd63c5dec66ea4c24, 0x9cb3944f8968c734, 0x567b1d6442a3044c, 0xb70601c44b9b8ffa},  // relu
{0xf5d0319a85d487b6, 0xd20090b8d8dca538, 0x5572b800ac7f700d, 0xbe9112b16b0f4d91},  // leaky_relu
{0xf39af93330ef686a, 0x6d1e83a41ab89cc6, 0x4650cdb6e4b49b1d, 0x81bcd862b82c8653},  // elu
{0xe838caed6df7c351, 0xf275a0cbe1f1984c, 0x62c51f789c1da128, 0x33c6130bb0c5b8d3},  // selu
{0x46ab57c129cb643c, 0x895d9d25b7fe5611, 0x61fc8d1618c2b1ac, 0xb7452f770d096943},  // gelu
{0xd727b6c8ab1fb942, 0x0e86262a219badf1, 0x0deb201e3dd1f503, 0xb5a031cc77662183},  // silu
{0x7d1460130fd00e16, 0x9c596ad0ce456e6f, 0x878270cf3883f5ce, 0xdad85959be62093b},  // tanh
{0xb8deea31f036b869, 0x9c59461cbb38c6de, 0xd141cbcf659acd30, 0x4811d13c12b2e067},  // sigmoid
{0x79453040ca646f67, 0xbf177d2317214cfd, 0x883fadbc783961f6, 0x31c055dc37b46de1},  // hardtanh
