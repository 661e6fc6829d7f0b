//! The forms that matrices have on a GPU: bf16, or codes with scales; and which tensors keep their codes there. The CUDA backend
//! packs them so (`src/backend/cuda/form.rs`), and a plan counts them so.

use super::quant::{BLOCK, Encoded, Fp8, Gguf, Int4, Scheme, kept_bytes};
use super::{DType, Tensor};
use crate::config::gcd;
use crate::gguf::TensorType;

/// Rows and inputs of a tile.
pub const TILE: [usize; 2] = [16, 64];
/// Inputs that a kernel counts to.
const MAX_IN: usize = 1 << 16;
/// Groups of inputs that kernels know, beside whole rows.
const GROUPS: [usize; 3] = [32, 64, 128];

/// How a matrix lies on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As rows.
    Bf16,
    /// 4-bit integers.
    Int4 {
        /// Whether scales are bf16, else f16.
        bf16_scales: bool,
        /// Inputs that share a scale.
        group: usize,
        /// Whether zero points are others than 8.
        zeros: bool,
    },
    /// 8-bit floats, a scale for 128 x 128.
    Fp8Blocks,
    /// 8-bit floats, a scale for a row.
    Fp8Rows,
    /// 4-bit floats, a scale for 16 inputs of a row, and one for 16 rows.
    Nvfp4,
    /// GGUF's blocks of this type.
    Gguf(TensorType),
}

/// Inputs that share a scale of NVFP4.
pub const NVFP4_GROUP: usize = 16;
/// The same of GGUF's Q4_0.
pub const Q4_0_GROUP: usize = 32;

impl Form {
    /// The form that keeps every number of a tensor as it is: bf16 where no kernel has one, which rounds what is
    /// something else.
    pub fn of(tensor: &Tensor) -> Self {
        Self::of_part(tensor, tensor.num_rows(), tensor.num_cols())
    }

    /// That of a rank's part of a tensor, so many rows of so many columns. Ranks' parts begin at multiples of their size.
    pub fn of_part(tensor: &Tensor, rows: usize, k: usize) -> Self {
        let tiles = rows.is_multiple_of(TILE[0]) && k.is_multiple_of(TILE[1]);
        if rows == 0 || k == 0 || k > MAX_IN || !tiles {
            return Form::Bf16;
        }
        match (tensor.encoded(), tensor.scheme()) {
            (Some(Encoded::Int4(int4)), _) => Self::of_int4(int4, k),
            (Some(Encoded::Fp8(fp8)), _) => Self::of_fp8(fp8, k),
            (Some(Encoded::Nvfp4(_)), _) => Form::Nvfp4,
            (Some(Encoded::Gguf(gguf)), _) if !k.is_multiple_of(gguf.kind.block_len()) => Form::Bf16,
            (Some(Encoded::Gguf(gguf)), _) if gguf.is_int4() => {
                Form::Int4 { bf16_scales: false, group: Q4_0_GROUP, zeros: false }
            }
            (Some(Encoded::Gguf(gguf)), _) if (Gguf { num_cols: k, ..gguf.clone() }).keeps_codes() => {
                Form::Gguf(gguf.kind)
            }
            (None, Some(Scheme::Int4 { group })) if group >= k || GROUPS.contains(&group) => {
                Form::Int4 { bf16_scales: true, group, zeros: false }
            }
            (None, Some(Scheme::Fp8 { matrix_rows })) if matrix_rows.is_multiple_of(TILE[0]) => {
                Form::Fp8Blocks
            }
            _ => Form::Bf16,
        }
    }

    /// That of tensors which must be in one.
    pub fn of_all(forms: impl IntoIterator<Item = Form>) -> Self {
        let mut forms = forms.into_iter();
        let form = forms.next().unwrap_or(Form::Bf16);
        if forms.all(|other| other == form) { form } else { Form::Bf16 }
    }

    /// Those of a sparse block's matrices: into the experts and out of them, and the same of the shared one.
    pub fn of_block(forms: [Form; 4], sizes: BlockSizes) -> [Form; 4] {
        forms.map(|form| if sizes.take_codes() { form.beside(&forms) } else { Form::Bf16 })
    }

    /// What it is beside these: no kernel has both floats of 4 or 8 bits and GGUF's blocks.
    fn beside(self, others: &[Form]) -> Self {
        let floats = matches!(self, Form::Fp8Blocks | Form::Fp8Rows | Form::Nvfp4);
        if floats && others.iter().any(|form| matches!(form, Form::Gguf(_))) { Form::Bf16 } else { self }
    }

    fn of_int4(int4: &Int4, k: usize) -> Self {
        let group = shared_by(int4.group, int4.num_cols, k);
        let bf16_scales = match int4.scales.dtype {
            DType::BF16 => true,
            DType::F16 => false,
            _ => return Form::Bf16,
        };
        if group < k && !GROUPS.contains(&group) {
            return Form::Bf16;
        }
        Form::Int4 { bf16_scales, group, zeros: !int4.is_symmetric() }
    }

    fn of_fp8(fp8: &Fp8, k: usize) -> Self {
        let (rows, columns) = (fp8.block[0], shared_by(fp8.block[1], fp8.num_cols, k));
        let tiles = rows % TILE[0] == 0 || rows >= fp8.num_rows;
        match () {
            () if !fp8.num_rows.is_multiple_of(TILE[0]) => Form::Bf16,
            () if columns >= k && (rows == 1 || tiles) => Form::Fp8Rows,
            () if columns == BLOCK && tiles => Form::Fp8Blocks,
            () => Form::Bf16,
        }
    }

    /// Groups of a row.
    fn num_groups(self, k: usize) -> usize {
        match self {
            Form::Bf16 => 0,
            Form::Int4 { group, .. } => k.div_ceil(group.max(1)),
            Form::Fp8Blocks => k.div_ceil(BLOCK),
            Form::Fp8Rows => 1,
            Form::Nvfp4 => k / NVFP4_GROUP,
            Form::Gguf(_) => k / TILE[1],
        }
    }

    /// Bytes of codes, scales and zero points.
    pub fn bytes(self, rows: usize, k: usize) -> [usize; 3] {
        let groups = self.num_groups(k);
        match self {
            Form::Bf16 => [2 * rows * k, 0, 0],
            Form::Int4 { zeros, .. } => {
                [rows * k / 2, 2 * rows * groups, if zeros { rows * groups } else { 0 }]
            }
            Form::Fp8Blocks => [rows * k, 4 * rows / TILE[0] * groups, 0],
            Form::Fp8Rows => [rows * k, 4 * rows, 0],
            Form::Nvfp4 => [rows * k / 2, rows * groups + 4 * rows / TILE[0], 0],
            Form::Gguf(kind) => {
                let [codes, scales] = kept_bytes(kind, rows * k).unwrap_or_default();
                [codes, scales, 0]
            }
        }
    }
}

/// Sizes of a sparse block, by which kernels are found.
#[derive(Debug, Clone, Copy)]
pub struct BlockSizes {
    /// Inputs of an expert.
    pub hidden: usize,
    /// Its width.
    pub width: usize,
    /// That of the shared expert.
    pub shared_width: usize,
    /// Experts of a token.
    pub top_k: usize,
}

impl BlockSizes {
    /// Whether there are kernels for experts of these sizes with codes.
    fn take_codes(self) -> bool {
        let whole = [self.hidden, self.width, self.shared_width].iter().all(|size| size % 64 == 0);
        whole && self.hidden <= 4096 && self.top_k <= 32
    }
}

/// Columns that share a scale in parts of `k` of the `num_cols` columns, of which `group` share one in the whole.
fn shared_by(group: usize, num_cols: usize, k: usize) -> usize {
    match () {
        () if k == num_cols => group,
        () if group.is_multiple_of(k) => k,
        () => gcd(group, k),
    }
}
