// SPDX-License-Identifier: Apache-2.0
//! The templates that lay out Salvor's domains, and their rendering.
//!
//! Owns: which templates there are, an operator's replacements, and the rule that every value is escaped. Only text that
//! this crate itself serialised goes in as it is; a template has no way to switch escaping off.
//! Does not know: what the templates are given, or what a domain is.

use std::collections::BTreeMap;

use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};
use serde::Serialize;

use crate::xml::{Element, XmlError, escape};

/// The name of a template Salvor uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TemplateName {
    /// A server of Salvor's own making.
    Server,
    /// The rescue of any server.
    Rescue,
}

impl TemplateName {
    /// Every template.
    pub const ALL: [Self; 2] = [Self::Server, Self::Rescue];

    /// The file name of the template, in the operator's folder as well.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Server => "server.xml",
            Self::Rescue => "rescue.xml",
        }
    }

    fn builtin(self) -> &'static str {
        match self {
            Self::Server => include_str!("../templates/server.xml"),
            Self::Rescue => include_str!("../templates/rescue.xml"),
        }
    }
}

/// Why templates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplatesError {
    /// No template has this name.
    #[error("there is no template `{name}`; an override may be called server.xml or rescue.xml")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The template's text is not one.
    #[error("template `{name}` cannot be read; correct it or remove the override")]
    Syntax {
        /// The template.
        name: &'static str,
        /// Where and why.
        #[source]
        source: minijinja::Error,
    },
}

/// Why a template did not render to XML.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// It stopped on an error of its own, for example a variable it is not given.
    #[error("template `{name}` failed")]
    Failed {
        /// The template.
        name: &'static str,
        /// Where and why.
        #[source]
        source: minijinja::Error,
    },
    /// What it rendered is not XML.
    #[error("template `{name}` rendered something that is not XML")]
    NotXml {
        /// The template.
        name: &'static str,
        /// What is wrong.
        #[source]
        source: XmlError,
    },
}

/// The set of templates in use: Salvor's own, some of them perhaps replaced by the operator.
#[derive(Debug)]
pub struct Templates {
    environment: Environment<'static>,
}

impl Templates {
    /// Salvor's own templates.
    ///
    /// # Errors
    /// Never for a released Salvor: its own templates are part of the tests.
    pub fn builtin() -> Result<Self, TemplatesError> {
        Self::with_overrides(BTreeMap::new())
    }

    /// Salvor's templates with some replaced: file name → text.
    ///
    /// # Errors
    /// [`TemplatesError`]: a name that is no template's, or a text that is no template. That it renders to a usable
    /// domain is not checked here; [`crate::fixtures::matrix`] does that.
    pub fn with_overrides(overrides: BTreeMap<String, String>) -> Result<Self, TemplatesError> {
        let mut environment = Environment::new();
        environment.set_keep_trailing_newline(true);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| AutoEscape::Custom("xml"));
        environment.remove_filter("safe");
        environment.set_formatter(|out, _state, value| {
            if value.is_none() {
                // Printing "none" into a domain would be a surprise nobody sees.
                return Err(minijinja::Error::new(
                    minijinja::ErrorKind::InvalidOperation,
                    "tried to print a value that is none; ask `is not none` first",
                ));
            }
            let text = value.to_string();
            out.write_str(&if value.is_safe() {
                text.into()
            } else {
                escape(&text)
            })?;
            Ok(())
        });
        let mut overrides = overrides;
        for name in TemplateName::ALL {
            let file_name = name.file_name();
            let text = overrides
                .remove(file_name)
                .unwrap_or_else(|| name.builtin().to_owned());
            environment
                .add_template_owned(file_name, text)
                .map_err(|source| TemplatesError::Syntax {
                    name: file_name,
                    source,
                })?;
        }
        match overrides.into_keys().next() {
            Some(name) => Err(TemplatesError::Unknown { name }),
            None => Ok(Self { environment }),
        }
    }

    /// Renders a template and reads the result back, so that nothing but well-formed XML ever leaves.
    pub(crate) fn render(
        &self,
        name: TemplateName,
        context: impl Serialize,
    ) -> Result<String, LayoutError> {
        let name = name.file_name();
        let failed = |source| LayoutError::Failed { name, source };
        let template = self.environment.get_template(name).map_err(failed)?;
        let xml = template.render(context).map_err(failed)?;
        Element::parse(&xml).map_err(|source| LayoutError::NotXml { name, source })?;
        Ok(xml)
    }
}

/// XML of our own making, which a template prints as it is.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub(crate) struct OwnXml(Value);

impl<T: std::fmt::Display + XmlNode> From<&T> for OwnXml {
    fn from(node: &T) -> Self {
        Self(Value::from_safe_string(node.to_string()))
    }
}

/// What prints as escaped XML. Keeps plain strings out of [`OwnXml`].
pub(crate) trait XmlNode {}
impl XmlNode for Element {}
impl XmlNode for crate::xml::Node {}
