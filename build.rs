//! Compiles `cuda/*.cu` into one static archive when the `cuda` feature is on, and links the static CUDA runtime, which
//! looks for the driver only when it is first used.
//!
//! nvcc is, in this order: the file that NVCC names; that of CUDA_HOME; that of the `nvidia-cuda-nvcc` wheel in the
//! building Python (PYO3_PYTHON, or the python on PATH); the one on PATH. QWEN35RS_CUDA_ARCHS ("80,90a") narrows the
//! architectures.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// What is compiled for, lowest first.
const ARCHS: &str = "80,89,90a,100a,120a";

const INSTALL: &str = "the `cuda` feature needs nvcc of CUDA 13: set NVCC or CUDA_HOME, or run\n    \
    pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
    'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'\nin the Python that builds (PYO3_PYTHON), or build without \
    the feature";

/// Prints where the building Python may have the wheels' toolkit: each entry of its path.
const ENTRIES: &str = "import sys, sysconfig
for entry in dict.fromkeys([*sys.path, *map(sysconfig.get_path, ('purelib', 'platlib'))]): print(entry)";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=cuda");
    for name in ["NVCC", "CUDA_HOME", "PYO3_PYTHON", "QWEN35RS_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if let Err(error) = build() {
        for line in error.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    let mut sources: Vec<PathBuf> = std::fs::read_dir("cuda")
        .map_err(|e| format!("cuda: {e}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    if sources.is_empty() {
        return Err("cuda: found no .cu file".into());
    }
    let nvcc = find_nvcc().ok_or(INSTALL)?;
    let cores = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).max(1);
    let flags = flags(cores / sources.len())?;
    let objects: Vec<PathBuf> =
        sources.iter().map(|s| out.join(s.file_name().unwrap_or_default()).with_extension("o")).collect();

    // As many at once as there are cores, in order; the first to fail is what is reported.
    let (queue, failed) = (Mutex::new(sources.iter().zip(&objects)), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..cores.min(sources.len()) {
            scope.spawn(|| {
                while let Some((source, object)) = queue.lock().ok().and_then(|mut q| q.next()) {
                    let mut command = Command::new(&nvcc);
                    command.args(&flags).arg("-c").arg(source).arg("-o").arg(object);
                    if let (Err(error), Ok(mut failed)) = (run(&mut command), failed.lock()) {
                        failed.get_or_insert(error);
                        return;
                    }
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().map_err(|e| e.to_string())? {
        return Err(error);
    }
    let archive = out.join("libqwen35rs_cuda.a");
    drop(std::fs::remove_file(&archive));
    run(Command::new(&nvcc).args(["-lib", "-o"]).arg(&archive).args(&objects))?;

    // A copy: a wheel's toolkit lives in a temporary folder while the package is built, and cargo remembers paths.
    let runtime = find_runtime(&nvcc)?;
    std::fs::copy(&runtime, out.join("libcudart_static.a"))
        .map_err(|e| format!("{}: {e}", runtime.display()))?;
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-lib=static=qwen35rs_cuda");
    println!("cargo:rustc-link-lib=static=cudart_static");
    println!("cargo:rustc-link-lib=dylib=stdc++");
    for name in ["dl", "pthread", "rt"] {
        println!("cargo:rustc-link-lib=dylib={name}");
    }
    Ok(())
}

fn flags(threads: usize) -> Result<Vec<String>, String> {
    let archs = env::var("QWEN35RS_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    // Compressed, which every driver for CUDA 13 reads: a fifth of the size.
    let fixed = "-std=c++17 -O3 --cudadevrt none --compress-mode=size -Werror all-warnings \
                 -Xcompiler -fPIC,-Wall,-Werror,-fvisibility=hidden";
    let mut flags: Vec<String> = fixed.split(' ').map(String::from).collect();
    flags.push(format!("--threads={}", threads.max(1)));
    for (i, arch) in archs.split(',').map(str::trim).enumerate() {
        if arch.is_empty() || !arch.starts_with(|c: char| c.is_ascii_digit()) {
            let allowed = format!("numbers such as {ARCHS}");
            return Err(format!("QWEN35RS_CUDA_ARCHS: found {archs:?}; allowed: {allowed}"));
        }
        // PTX of the lowest, where it may run on later cards: the driver compiles it for one that is not listed.
        let ptx = i == 0 && arch.ends_with(|c: char| c.is_ascii_digit());
        let code = if ptx { format!("[sm_{arch},compute_{arch}]") } else { format!("sm_{arch}") };
        flags.push(format!("-gencode=arch=compute_{arch},code={code}"));
    }
    Ok(flags)
}

fn find_nvcc() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(nvcc) = set("NVCC") {
        return Some(nvcc);
    }
    let in_home = set("CUDA_HOME").map(|home| home.join("bin/nvcc"));
    let python = set("PYO3_PYTHON").unwrap_or_else(|| "python3".into());
    let entries = Command::new(python).args(["-c", ENTRIES]).output().ok();
    let entries = entries.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let in_wheel = entries.lines().map(|entry| Path::new(entry).join("nvidia/cu13/bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|entry| entry.join("nvcc"));
    in_home.into_iter().chain(in_wheel).chain(on_path).find(|nvcc| nvcc.is_file())
}

/// `libcudart_static.a` of the toolkit that an nvcc belongs to.
fn find_runtime(nvcc: &Path) -> Result<PathBuf, String> {
    let real = nvcc.canonicalize().unwrap_or_else(|_| nvcc.to_path_buf());
    let roots = [nvcc, &real].into_iter().filter_map(|n| n.parent()?.parent());
    let places =
        ["lib", "lib64", "lib/x86_64-linux-gnu", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"];
    roots
        .flat_map(|root| places.map(|place| root.join(place).join("libcudart_static.a")))
        .find(|file| file.is_file())
        .ok_or_else(|| format!("found no libcudart_static.a beside {}; {INSTALL}", nvcc.display()))
}

fn run(command: &mut Command) -> Result<(), String> {
    let shown = format!("{command:?}");
    let output = command.output().map_err(|e| format!("{shown}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].map(|t| String::from_utf8_lossy(&t).into_owned()).concat();
    Err(format!("{shown}\n{}\n{}", output.status, text.trim_end()))
}
