//! `config.json` to a checked [`ModelConfig`]: every number the net needs, and a refusal by name of
//! whatever it cannot run. Owns no files beyond the two it reads; knows no weights and no device.

/// The geometry and constants of one Qwen3.5 text model. All sizes are in elements.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `qwen3_5` or `qwen3_5_moe`, as the checkpoint says (a `_text` suffix is dropped).
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and of the head, padding rows included.
    pub vocab: usize,
    /// The mixer of each layer, first layer first.
    pub layers: Vec<LayerKind>,
    /// Full-attention layers.
    pub attention: AttentionConfig,
    /// Gated DeltaNet layers.
    pub delta: DeltaConfig,
    /// The feed-forward block, the same in every layer.
    pub ffn: FfnConfig,
    /// Epsilon of every RMSNorm.
    pub rms_eps: f32,
    /// Rotary embedding of the full-attention layers.
    pub rope: RopeConfig,
    /// Longest context, in tokens, that the checkpoint declares.
    pub max_position: usize,
    /// Whether `lm_head` is the embedding.
    pub tied_embeddings: bool,
    /// Whether the checkpoint declares a vision tower.
    pub has_vision: bool,
    /// Layers of the multi-token-prediction module (0 or 1).
    pub num_mtp_layers: usize,
}

/// The two mixers of the hybrid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// Gated DeltaNet: a recurrent state per sequence.
    DeltaNet,
    /// Softmax attention over every earlier token: pages of keys and values.
    Attention,
}

/// Sizes of the full-attention layers.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub num_q_heads: usize,
    /// Key and value heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// Sizes of the Gated DeltaNet layers.
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaConfig {
    /// Query/key heads.
    pub num_k_heads: usize,
    /// Value heads; a multiple of `num_k_heads`. Value head `h` reads key head `h / (V / K)`.
    pub num_v_heads: usize,
    /// Width of a key head.
    pub k_dim: usize,
    /// Width of a value head.
    pub v_dim: usize,
    /// Taps of the causal convolution.
    pub conv_kernel: usize,
}

/// The feed-forward block.
#[derive(Debug, Clone, PartialEq)]
pub enum FfnConfig {
    /// One SwiGLU of this width.
    Dense {
        /// Width of the hidden activation.
        width: usize,
    },
    /// Routed experts and one gated shared expert.
    Moe {
        /// Routed experts.
        num_experts: usize,
        /// Experts a token is sent to.
        top_k: usize,
        /// Width of a routed expert.
        expert_width: usize,
        /// Width of the shared expert.
        shared_width: usize,
    },
}

/// The rotary embedding of the full-attention layers.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading dimensions of a head that rotate (even).
    pub rotary_dim: usize,
    /// Frequencies that follow the T, H and W position; sums to `rotary_dim / 2`.
    pub mrope_section: [usize; 3],
    /// YaRN, where the checkpoint asks for it.
    pub yarn: Option<YarnConfig>,
}

/// YaRN's context extension (static: it also applies to short prompts).
#[derive(Debug, Clone, PartialEq)]
pub struct YarnConfig {
    /// Context multiplier.
    pub factor: f64,
    /// The context the model was trained for.
    pub original_max_position: usize,
    /// Wavelengths per context above which a frequency is kept.
    pub beta_fast: f64,
    /// Wavelengths per context below which a frequency is divided by `factor`.
    pub beta_slow: f64,
    /// Multiplied into cos and sin.
    pub attention_factor: f64,
    /// Whether the correction range is rounded outwards to whole frequencies.
    pub truncate: bool,
}

impl DeltaConfig {
    /// Channels of the convolution: q, k and v side by side.
    pub fn conv_channels(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    /// Width of all key heads.
    pub fn key_width(&self) -> usize {
        self.num_k_heads * self.k_dim
    }

    /// Width of all value heads.
    pub fn value_width(&self) -> usize {
        self.num_v_heads * self.v_dim
    }
}

impl AttentionConfig {
    /// Width of all query heads.
    pub fn q_width(&self) -> usize {
        self.num_q_heads * self.head_dim
    }

    /// Width of all key (or value) heads.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}
