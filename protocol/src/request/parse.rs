//! Text to request, by recursive descent. Every error knows the place it is about.

use core::{fmt, str::FromStr};

use thiserror::Error;

use super::{
    CPU_CORES_MAX, GPUS_PER_PROCESS_MAX, GROUPS_MAX, GpuNeed, Group, MEMORY_BYTES_MAX,
    MODEL_CHARS_MAX, NEEDS_MAX, PROCESSES_MAX, Process, RAM_GIB_MAX, Request, TEXT_BYTES_MAX,
    is_name_byte,
};

/// Where a text leaves the grammar, and what was expected there.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{problem} at character {}", .character + 1)]
pub struct ParseError {
    problem: Problem,
    byte: usize,
    character: usize,
    excerpt: Excerpt,
}

/// What is wrong at the place of a [`ParseError`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Problem {
    /// Something else was expected.
    #[error("expected {expected}, found {found}")]
    Expected {
        /// What could have stood there.
        expected: &'static str,
        /// What stands there, quoted.
        found: String,
    },
    /// A count of nothing.
    #[error("expected at least 1, found 0 {what}")]
    Zero {
        /// What is counted.
        what: &'static str,
    },
    /// More than a bound of the grammar.
    #[error("expected at most {max} {what}")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// The bound.
        max: u64,
    },
    /// `cpu` or `ram` a second time in one process.
    #[error("expected `{what}` only once in a process")]
    Twice {
        /// Which.
        what: &'static str,
    },
    /// `>=` behind `cpu` or `ram`, whose amount is its count.
    #[error("expected `>=` only behind a GPU; an amount of `{what}` is written `16:{what}`")]
    NotConstrained {
        /// Which.
        what: &'static str,
    },
}

impl ParseError {
    /// What is wrong.
    #[must_use]
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Bytes before the place; at most the text's length, and between two characters.
    #[must_use]
    pub fn byte(&self) -> usize {
        self.byte
    }

    /// Characters before the place.
    #[must_use]
    pub fn character(&self) -> usize {
        self.character
    }

    /// Two lines: the text, and a caret under the place with what was expected.
    ///
    /// ```text
    /// 2:[v100
    ///        ^ expected `,`, `>=` or `]`, found the end
    /// ```
    ///
    /// The text is its line around the place, cut to fit a terminal.
    #[must_use]
    pub fn caret(&self) -> String {
        let Excerpt { line, column, .. } = &self.excerpt;
        format!("{line}\n{:column$}^ {}", "", self.problem)
    }

    /// Line and character in it where the problem is, both from 1.
    #[must_use]
    pub fn place(&self) -> (usize, usize) {
        self.excerpt.place
    }

    fn new(text: &str, byte: usize, problem: Problem) -> Self {
        let character = text[..byte].chars().count();
        Self { problem, byte, character, excerpt: Excerpt::around(text, byte) }
    }
}

/// One line's part of the text, short enough for a terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Excerpt {
    line: String,
    /// Characters before the place.
    column: usize,
    /// Line and character of the place in the whole text, from 1.
    place: (usize, usize),
}

impl Excerpt {
    /// Characters shown on each side of the place.
    const SIDE_CHARS_MAX: usize = 50;

    fn around(text: &str, byte: usize) -> Self {
        let is_break = |c: char| c == '\n' || c == '\r';
        let start = text[..byte].rfind(is_break).map_or(0, |i| i + 1);
        let end = text[byte..].find(is_break).map_or(text.len(), |i| byte + i);
        let before: Vec<char> = text[start..byte].chars().collect();
        let place = (text[..byte].matches('\n').count() + 1, before.len() + 1);
        let cut = before.len().saturating_sub(Self::SIDE_CHARS_MAX);
        let mut line = String::from(if cut > 0 { "…" } else { "" });
        line.extend(before[cut..].iter().copied().map(printable));
        let column = line.chars().count();
        let mut after = text[byte..end].chars();
        line.extend(after.by_ref().take(Self::SIDE_CHARS_MAX).map(printable));
        line.push_str(if after.next().is_some() { "…" } else { "" });
        Self { line, column, place }
    }
}

/// One column wide where possible, and never a control sequence.
fn printable(c: char) -> char {
    if c.is_whitespace() {
        ' '
    } else if c.is_control() {
        '\u{fffd}'
    } else {
        c
    }
}

impl FromStr for Request {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse(text)
    }
}

pub(super) fn parse(text: &str) -> Result<Request, ParseError> {
    if text.len() > TEXT_BYTES_MAX {
        let cut = (0..=TEXT_BYTES_MAX).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        let problem = Problem::TooMany { what: "bytes of text", max: TEXT_BYTES_MAX as u64 };
        return Err(ParseError::new(text, cut, problem));
    }
    Parser::new(text).request()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    Open,
    Close,
    Comma,
    Colon,
    AtLeast,
    /// A count, a name or a size.
    Word(&'a str),
    Stray(char),
    End,
}

impl fmt::Display for Token<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("`[`"),
            Self::Close => f.write_str("`]`"),
            Self::Comma => f.write_str("`,`"),
            Self::Colon => f.write_str("`:`"),
            Self::AtLeast => f.write_str("`>=`"),
            Self::Word(word) if word.len() > MODEL_CHARS_MAX => {
                write!(f, "`{}…`", &word[..MODEL_CHARS_MAX])
            }
            Self::Word(word) => write!(f, "`{word}`"),
            Self::Stray(c) if c.is_control() => write!(f, "`{}`", c.escape_default()),
            Self::Stray(c) => write!(f, "`{c}`"),
            Self::End => f.write_str("the end"),
        }
    }
}

/// Stands before `token`, which begins at byte `at`.
struct Parser<'a> {
    text: &'a str,
    at: usize,
    token: Token<'a>,
    /// Where the token after this one, blanks included, begins.
    next: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        let mut parser = Self { text, at: 0, token: Token::End, next: 0 };
        parser.advance();
        parser
    }

    fn request(mut self) -> Result<Request, ParseError> {
        if self.token == Token::End {
            return Ok(Request::default());
        }
        let mut groups = Vec::new();
        let mut processes = 0;
        loop {
            if groups.len() == GROUPS_MAX {
                return Err(self.too_many(self.at, "process groups", GROUPS_MAX as u64));
            }
            groups.push(self.group(&mut processes)?);
            match self.token {
                Token::Comma => self.advance(),
                Token::End => return Ok(Request { groups }),
                _ => return Err(self.expected("`,` or the end")),
            }
        }
    }

    fn group(&mut self, processes: &mut u32) -> Result<Group, ParseError> {
        let start = self.at;
        let count = match self.token {
            Token::Open => 1,
            Token::Word(word) if is_number(word) => {
                let count = self.amount(start, Some(word), "processes", PROCESSES_MAX)?;
                self.advance();
                self.take(Token::Colon, "`:` and the `[` of a process")?;
                count
            }
            _ => return Err(self.expected("a count of processes or `[`")),
        };
        *processes += count;
        if *processes > PROCESSES_MAX {
            return Err(self.too_many(start, "processes in all", PROCESSES_MAX.into()));
        }
        self.take(Token::Open, "the `[` of a process")?;
        let process = self.process()?;
        Ok(Group { count, process })
    }

    fn process(&mut self) -> Result<Process, ParseError> {
        let mut process = Process::default();
        if self.token == Token::Close {
            self.advance();
            return Ok(process);
        }
        loop {
            let may_follow = self.need(&mut process)?;
            match self.token {
                Token::Comma => self.advance(),
                Token::Close => {
                    self.advance();
                    return Ok(process);
                }
                _ => return Err(self.expected(may_follow)),
            }
        }
    }

    /// Reads one need into `process`, and says what may follow it.
    fn need(&mut self, process: &mut Process) -> Result<&'static str, ParseError> {
        let start = self.at;
        let count = self.need_count()?;
        let name = self.name(count.is_some())?;
        match name.as_str() {
            "cpu" => {
                let cores = self.amount(start, count, "cores", CPU_CORES_MAX)?;
                self.once(start, &mut process.cpu_cores, cores, "cpu")
            }
            "ram" => {
                let gib = self.amount(start, count, "GiB of memory", RAM_GIB_MAX)?;
                self.once(start, &mut process.ram_gib, gib, "ram")
            }
            _ => {
                let count = self.amount(start, count, "GPUs in a process", GPUS_PER_PROCESS_MAX)?;
                self.gpu_need(start, count, name, process)
            }
        }
    }

    /// The digits before a `:`, which is what makes them a count.
    fn need_count(&mut self) -> Result<Option<&'a str>, ParseError> {
        match (self.token, self.following()) {
            (Token::Word(digits), Token::Colon) if is_number(digits) => {
                self.advance();
                self.advance();
                Ok(Some(digits))
            }
            (Token::Word(_), Token::Colon) => Err(self.expected("a count before `:`")),
            _ => Ok(None),
        }
    }

    /// A name in lower case.
    fn name(&mut self, is_counted: bool) -> Result<String, ParseError> {
        let word = match self.token {
            Token::Word(word) if word.starts_with(|c: char| c.is_ascii_alphanumeric()) => word,
            _ if is_counted => return Err(self.expected("a GPU model, `gpu`, `cpu` or `ram`")),
            _ => return Err(self.expected("a GPU model, `gpu`, `cpu`, `ram` or a count")),
        };
        if word.len() > MODEL_CHARS_MAX {
            let what = "characters in a GPU model";
            return Err(self.too_many(self.at, what, MODEL_CHARS_MAX as u64));
        }
        self.advance();
        Ok(word.to_ascii_lowercase())
    }

    fn once(
        &mut self,
        start: usize,
        slot: &mut Option<u32>,
        amount: u32,
        what: &'static str,
    ) -> Result<&'static str, ParseError> {
        if slot.replace(amount).is_some() {
            return Err(ParseError::new(self.text, start, Problem::Twice { what }));
        }
        if self.token == Token::AtLeast {
            return Err(ParseError::new(self.text, self.at, Problem::NotConstrained { what }));
        }
        Ok("`,` or `]`")
    }

    fn gpu_need(
        &mut self,
        start: usize,
        count: u32,
        name: String,
        process: &mut Process,
    ) -> Result<&'static str, ParseError> {
        let mut may_follow = "`,`, `>=` or `]`";
        let mut memory_bytes_min = None;
        if self.token == Token::AtLeast {
            self.advance();
            memory_bytes_min = Some(self.size()?);
            may_follow = "`,` or `]`";
        }
        let model = (name != "gpu").then_some(name);
        process.gpus.push(GpuNeed { count, model, memory_bytes_min });
        if process.gpus.len() > NEEDS_MAX {
            return Err(self.too_many(start, "GPU needs in a process", NEEDS_MAX as u64));
        }
        if process.gpu_count() > GPUS_PER_PROCESS_MAX {
            return Err(self.too_many(start, "GPUs in a process", GPUS_PER_PROCESS_MAX.into()));
        }
        Ok(may_follow)
    }

    /// A size such as `24g`, in bytes.
    fn size(&mut self) -> Result<u64, ParseError> {
        let Token::Word(word) = self.token else {
            return Err(self.expected("a size such as `24g`"));
        };
        let digits = word.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, unit) = word.split_at(digits);
        if digits.is_empty() {
            return Err(self.expected("a size such as `24g`"));
        }
        let shift = match unit.to_ascii_lowercase().as_str() {
            "g" => 30,
            "m" => 20,
            "k" => 10,
            "b" => 0,
            _ => return Err(self.unit_expected(digits, unit)),
        };
        let problem = match digits.parse::<u64>() {
            Ok(0) => Problem::Zero { what: "bytes of GPU memory" },
            Ok(n) if n <= MEMORY_BYTES_MAX >> shift => {
                self.advance();
                return Ok(n << shift);
            }
            _ => Problem::TooMany { what: "bytes of GPU memory", max: MEMORY_BYTES_MAX },
        };
        Err(ParseError::new(self.text, self.at, problem))
    }

    fn unit_expected(&self, digits: &str, unit: &str) -> ParseError {
        let found = if unit.is_empty() { self.following() } else { Token::Word(unit) };
        let expected = "`g` (GiB) or `m` (MiB) right behind the number";
        let problem = Problem::Expected { expected, found: found.to_string() };
        ParseError::new(self.text, self.at + digits.len(), problem)
    }

    /// The number in `digits`, 1 where there are none; `at` is its place.
    fn amount(
        &self,
        at: usize,
        digits: Option<&str>,
        what: &'static str,
        max: u32,
    ) -> Result<u32, ParseError> {
        match digits.map(str::parse) {
            None => Ok(1),
            Some(Ok(0)) => Err(ParseError::new(self.text, at, Problem::Zero { what })),
            Some(Ok(n)) if n <= max => Ok(n),
            Some(Ok(_) | Err(_)) => Err(self.too_many(at, what, max.into())),
        }
    }

    fn take(&mut self, token: Token<'_>, expected: &'static str) -> Result<(), ParseError> {
        if self.token != token {
            return Err(self.expected(expected));
        }
        self.advance();
        Ok(())
    }

    fn expected(&self, expected: &'static str) -> ParseError {
        let problem = Problem::Expected { expected, found: self.token.to_string() };
        ParseError::new(self.text, self.at, problem)
    }

    fn too_many(&self, at: usize, what: &'static str, max: u64) -> ParseError {
        ParseError::new(self.text, at, Problem::TooMany { what, max })
    }

    fn advance(&mut self) {
        (self.at, self.token, self.next) = scan(self.text, self.next);
    }

    fn following(&self) -> Token<'a> {
        scan(self.text, self.next).1
    }
}

/// Where the first token at or behind byte `from` begins, what it is, where it ends.
fn scan(text: &str, from: usize) -> (usize, Token<'_>, usize) {
    let rest = text[from..].trim_start();
    let at = text.len() - rest.len();
    let Some(first) = rest.chars().next() else { return (at, Token::End, at) };
    let word = rest.bytes().take_while(|&b| is_name_byte(b)).count();
    let (token, len) = match first {
        '[' => (Token::Open, 1),
        ']' => (Token::Close, 1),
        ',' => (Token::Comma, 1),
        ':' => (Token::Colon, 1),
        '>' if rest.starts_with(">=") => (Token::AtLeast, 2),
        _ if word > 0 => (Token::Word(&rest[..word]), word),
        _ => (Token::Stray(first), first.len_utf8()),
    };
    (at, token, at + len)
}

fn is_number(word: &str) -> bool {
    word.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn everything_the_grammar_has_is_read() {
        let need = |count, model: &str, gib: Option<u64>| GpuNeed {
            count,
            model: (model != "gpu").then(|| model.to_owned()),
            memory_bytes_min: gib.map(|g| g << 30),
        };
        let gpus = |gpus: Vec<GpuNeed>| Process { gpus, ..Process::default() };
        let one = |process| Request { groups: vec![Group { count: 1, process }] };
        for (text, request) in [
            ("", Request::default()),
            (" \t\n", Request::default()),
            ("[]", Request::default()),
            ("[ ]\n", Request::default()),
            ("[v100]", one(gpus(vec![need(1, "v100", None)]))),
            ("[3090]", one(gpus(vec![need(1, "3090", None)]))),
            ("[2:3090]", one(gpus(vec![need(2, "3090", None)]))),
            ("[ 2 : 3090 >= 24g ]", one(gpus(vec![need(2, "3090", Some(24))]))),
            ("[A100-80GB]", one(gpus(vec![need(1, "a100-80gb", None)]))),
            ("[3:a100.1g.5gb]", one(gpus(vec![need(3, "a100.1g.5gb", None)]))),
            ("[4:gpu>=24g]", one(gpus(vec![need(4, "gpu", Some(24))]))),
            (
                "[2:gpu,16:cpu,64:ram]",
                one(Process {
                    gpus: vec![need(2, "gpu", None)],
                    cpu_cores: Some(16),
                    ram_gib: Some(64),
                }),
            ),
            ("[cpu]", one(Process { cpu_cores: Some(1), ..Process::default() })),
            (
                "2:[],4:[gtx1070,2:gtx1060]",
                Request {
                    groups: vec![
                        Group { count: 2, process: Process::default() },
                        Group {
                            count: 4,
                            process: gpus(vec![need(1, "gtx1070", None), need(2, "gtx1060", None)]),
                        },
                    ],
                },
            ),
        ] {
            assert_eq!(Request::parse(text), Ok(request), "{text}");
        }
    }

    #[test]
    fn an_error_points_at_the_character_and_says_what_was_expected() {
        for (text, character, message) in [
            ("2:[v100", 7, "expected `,`, `>=` or `]`, found the end"),
            ("2:[v100>=16g", 12, "expected `,` or `]`, found the end"),
            ("v100", 0, "expected a count of processes or `[`, found `v100`"),
            ("2", 1, "expected `:` and the `[` of a process, found the end"),
            ("2[v100]", 1, "expected `:` and the `[` of a process, found `[`"),
            ("2:v100", 2, "expected the `[` of a process, found `v100`"),
            ("[v100]]", 6, "expected `,` or the end, found `]`"),
            ("[v100],", 7, "expected a count of processes or `[`, found the end"),
            ("[v100,]", 6, "expected a GPU model, `gpu`, `cpu`, `ram` or a count, found `]`"),
            ("[2:]", 3, "expected a GPU model, `gpu`, `cpu` or `ram`, found `]`"),
            ("[v100:2]", 1, "expected a count before `:`, found `v100`"),
            ("[2 v100]", 3, "expected `,`, `>=` or `]`, found `v100`"),
            ("[-x]", 1, "expected a GPU model, `gpu`, `cpu`, `ram` or a count, found `-x`"),
            ("[gpu>24g]", 4, "expected `,`, `>=` or `]`, found `>`"),
            ("[gpu>=]", 6, "expected a size such as `24g`, found `]`"),
            ("[gpu>=g]", 6, "expected a size such as `24g`, found `g`"),
            ("[gpu>=24]", 8, "expected `g` (GiB) or `m` (MiB) right behind the number, found `]`"),
            ("[gpu>=24t]", 8, "expected `g` (GiB) or `m` (MiB) right behind the number, found `t`"),
            ("[gpu>=0g]", 6, "expected at least 1, found 0 bytes of GPU memory"),
            ("[gpu>=9999999g]", 6, "expected at most 1125899906842624 bytes of GPU memory"),
            ("0:[v100]", 0, "expected at least 1, found 0 processes"),
            ("[00:v100]", 1, "expected at least 1, found 0 GPUs in a process"),
            ("[v100,0:cpu]", 6, "expected at least 1, found 0 cores"),
            ("[2:cpu,cpu]", 7, "expected `cpu` only once in a process"),
            ("[ram,v100,4:RAM]", 10, "expected `ram` only once in a process"),
            (
                "[cpu>=4g]",
                4,
                "expected `>=` only behind a GPU; an amount of `cpu` is written `16:cpu`",
            ),
            ("[größe]", 3, "expected `,`, `>=` or `]`, found `ö`"),
            ("[\u{7}]", 1, "expected a GPU model, `gpu`, `cpu`, `ram` or a count, found `\\u{7}`"),
            ("1025:[]", 0, "expected at most 1024 processes"),
            ("1000:[],25:[]", 8, "expected at most 1024 processes in all"),
            ("99999999999999999999:[]", 0, "expected at most 1024 processes"),
            ("[65:gpu]", 1, "expected at most 64 GPUs in a process"),
            ("[60:gpu,5:v100]", 8, "expected at most 64 GPUs in a process"),
            ("[a,a,a,a,a,a,a,a,a]", 17, "expected at most 8 GPU needs in a process"),
        ] {
            let error = Request::parse(text).expect_err(text);
            assert_eq!(error.problem().to_string(), message, "{text}");
            assert_eq!(error.character(), character, "{text}");
            assert_eq!(error.to_string(), format!("{message} at character {}", character + 1));
        }
    }

    #[test]
    fn the_caret_stands_under_the_place_on_its_own_line_of_a_long_text() {
        let caret = |text: &str| Request::parse(text).unwrap_err().caret();
        assert_eq!(caret("2:[v100"), "2:[v100\n       ^ expected `,`, `>=` or `]`, found the end");
        assert_eq!(
            caret("[v100],\n\t2:[größe]\n"),
            " 2:[größe]\n      ^ expected `,`, `>=` or `]`, found `ö`"
        );
        let long = caret(&format!("{}[gpu>24g]{}", "[],".repeat(30), ",[]".repeat(30)));
        let lines: Vec<Vec<char>> = long.lines().map(|line| line.chars().collect()).collect();
        let column = lines[1].iter().position(|&c| c == '^').unwrap();
        assert_eq!((lines[0][0], lines[0][column]), ('…', '>'));
        let too_long = caret(&"é".repeat(TEXT_BYTES_MAX));
        assert!(too_long.contains("expected at most 32768 bytes of text"), "{too_long}");
        assert!(too_long.len() < 600);
    }

    #[test]
    fn one_request_has_at_most_32_groups_and_names_of_40_characters() {
        let groups = |n: usize| Request::parse(&vec!["[]"; n].join(","));
        assert!(groups(GROUPS_MAX).is_ok());
        assert_eq!(groups(GROUPS_MAX + 1).unwrap_err().byte(), 3 * GROUPS_MAX);
        let named = |n: usize| Request::parse(&format!("[{}]", "x".repeat(n)));
        assert!(named(MODEL_CHARS_MAX).is_ok());
        assert_eq!(named(MODEL_CHARS_MAX + 1).unwrap_err().byte(), 1);
    }

    proptest! {
        #[test]
        fn no_text_panics_and_an_error_lies_inside_it(text in any::<String>()) {
            error_lies_inside(&text)?;
        }

        #[test]
        fn nor_does_a_text_that_is_nearly_a_request(
            text in r"([0-9]{0,3}:?\[?(gpu|cpu|ram|v100|[0-9]|>=|24g|[:,>=é \n\[\]])*\]?,?){0,4}",
        ) {
            error_lies_inside(&text)?;
        }
    }

    fn error_lies_inside(text: &str) -> Result<(), TestCaseError> {
        match Request::parse(text) {
            Ok(request) => prop_assert_eq!(request.check(), Ok(())),
            Err(error) => {
                prop_assert!(error.byte() <= text.len());
                prop_assert_eq!(text[..error.byte()].chars().count(), error.character());
                prop_assert!(!error.to_string().contains('\n'));
                prop_assert_eq!(error.caret().lines().count(), 2);
            }
        }
        Ok(())
    }
}
