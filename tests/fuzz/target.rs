//! Every fuzz target: the binary's name is the target's (`weft::fuzz::TARGETS`).
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weft::fuzz::run(env!("CARGO_BIN_NAME"), bytes));
